"""Where a model comes from: a folder, a GGUF file, or a hub id; checked, and named by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from reltrace_worker.types.errors import ModelError

log = structlog.get_logger()

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_ADAPTER = "adapter_config.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_FP8 = {"F8_E4M3"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Of what a folder may hold beside its weights, what looks like other weights.
_OTHER_WEIGHTS = ("*.safetensors", "*.gguf", "*.pth", "*.pt", "pytorch_model*.bin")
_TRAINING_STATE = ("rng_state", "optimizer", "scheduler", "scaler", "training_args")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine.

    Parameters
    ----------
    path
        A folder, or a GGUF file.
    name
        Hub id, name of the folder, or name of the file without its ending.
    commit
        Of a hub id: what the revision that was asked for stands for.
    expected
        Of a GGUF file: how its revision must begin.
    """

    path: Path
    name: str
    commit: str | None = None
    expected: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path.is_file()

    def revision(self, shards: Iterable[Path] = ()) -> str:
        """Name the contents: a commit, or a digest, for which all files are read.

        Parameters
        ----------
        shards
            The files that hold a folder's weights.

        Returns
        -------
        str
            The commit; or ``"sha256:"`` and 12 hex digits: of a GGUF file itself, of a folder over
            names and contents of its weight, config and tokenizer files and chat template.

        Raises
        ------
        ModelError
            It is not what was expected.
        """
        if self.commit is not None:
            return self.commit
        if not self.is_gguf:
            return _folder_revision(self.path, shards)
        whole = f"sha256:{_digest(self.path)}"
        if self.expected is not None and not whole.startswith(self.expected):
            raise ModelError(f"{self.path} is {whole}, not {self.expected}: another file")
        return whole[: len("sha256:") + 12]


def find_source(source: str, revision: str | None) -> Source:
    """Find a checkpoint; one of the hub is downloaded, unless it is in the cache.

    Parameters
    ----------
    source
        A folder, a GGUF file, or a hub id.
    revision
        Branch, tag or commit of a hub id; of a GGUF file ``sha256:`` and the beginning of its
        digest.

    Raises
    ------
    ModelError
        There is no such thing; says what was tried.
    """
    path = Path(source).expanduser()
    if source and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"{source} is a file; a model is a folder, a .gguf file, or a hub id such as "
                "'org/name'"
            )
        if revision is not None and not re.fullmatch("sha256:[0-9a-f]{8,64}", revision):
            raise ModelError(
                f"the revision of a file reads sha256: and 8 to 64 hex digits, not {revision!r}"
            )
        return Source(path, path.stem, expected=revision)
    if source and path.is_dir():
        if revision is not None:
            raise ModelError(f"a revision ({revision!r}) is for hub ids; {source} is a folder")
        return Source(path, path.resolve().name)
    if source.lower().endswith(".gguf"):
        raise ModelError(f"there is no file {source!r}")
    if not source or source[0] in "./~" or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"there is no folder {source!r}, and it is no hub id either (those read 'org/name')"
        )
    # First what is small, which says what the weights are called. What a hub id stands for may
    # move while this runs; a commit does not.
    folder = _snapshot(source, revision, ["*.json", "*.jinja", "tokenizer.model"])
    weights = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        weights = sorted({*_index_shards(folder), _WEIGHTS})
    if not (folder / _ADAPTER).is_file():
        folder = _snapshot(source, folder.name, weights)
    return Source(folder, source, commit=folder.name)


def _snapshot(name: str, revision: str | None, files: list[str]) -> Path:
    """Return the folder of a hub model's commit, which its name is, with some of its files."""
    at = "" if revision is None else f" at {revision!r}"
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns="*/*")
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, and give a "
            "token of yours in HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"the hub's {name!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r}, and the hub has no model of that name, or a private one "
            "that needs a token in HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r}; as a hub id{at} it is not in the cache, and the hub can "
            "not be reached"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{name!r}{at} can not be had from the hub: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_folder(folder: Path) -> list[Path]:
    """Check that a folder holds a config, safetensors weights and a tokenizer, and no adapter.

    Returns
    -------
    list of Path
        The files of its weights, as transformers takes them. What looks like other weights is
        named in the log.

    Raises
    ------
    ModelError
        Names the file that is missing or in excess, and the folder.
    """
    shards = _shards(folder)
    if (folder / _ADAPTER).is_file():
        _refuse_adapter(folder, has_weights=any(shard.is_file() for shard in shards))
    config = folder / "config.json"
    if not config.is_file():
        if files := sorted(path.name for path in folder.glob("*.gguf")):
            raise ModelError(f"{folder} holds GGUF files: give the path of one, such as {files[0]}")
        raise ModelError(f"config.json is missing in {folder}")
    missing = sorted(shard.name for shard in shards if not shard.is_file())
    if missing == [_WEIGHTS]:
        others = sorted(
            path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix)
        )
        if others:
            raise ModelError(
                f"{folder} has weights in {others[0]} alone; supported: safetensors "
                f"({_WEIGHTS}, or {_INDEX} and its shards)"
            )
        raise ModelError(f"{_WEIGHTS} (or {_INDEX} and its shards) is missing in {folder}")
    if missing:
        raise ModelError(f"{', '.join(missing)} (named by {_INDEX}) is missing in {folder}")
    for shard in shards:
        _check_numbers(shard, quantization(_read_json(config)))
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"the tokenizer is missing in {folder}: tokenizer.json or tokenizer.model")
    _check_others(folder, {shard.name for shard in shards})
    return shards


def _shards(folder: Path) -> list[Path]:
    # As transformers looks for them: a single file first.
    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file() and (folder / _INDEX).is_file():
        names = _index_shards(folder)
    return [folder / name for name in names]


def _index_shards(folder: Path) -> list[str]:
    given = _object(_read_json(folder / _INDEX), "weight_map", _INDEX)
    if given is None:
        raise ModelError(f"{_INDEX} in {folder} has no weight_map")
    for weight, name in given.items():
        if not isinstance(name, str):
            raise ModelError(
                f"weight_map in {_INDEX} gives {name!r} for {weight}; it must be the name of a file"
            )
    return sorted(set(given.values()))


def _check_others(folder: Path, used: set[str]) -> None:
    """Look at weights that would not be read: which ones are meant may be a question."""
    others = sorted(
        {
            path.name
            for pattern in _OTHER_WEIGHTS
            for path in folder.glob(pattern)
            if path.name not in used and not path.name.startswith(_TRAINING_STATE)
        }
    )
    if _WEIGHTS in used and (folder / _INDEX).is_file():
        twice = [name for name in _index_shards(folder) if name in others]
        if twice:
            raise ModelError(
                f"{folder} has two sets of weights, {_WEIGHTS} and {', '.join(twice)} (named by "
                f"{_INDEX}); remove one"
            )
        others.append(_INDEX)
    if others:
        log.warning("model.files_not_used", folder=str(folder), files=others, used=sorted(used))


def _refuse_adapter(folder: Path, has_weights: bool) -> None:
    base = _read_json(folder / _ADAPTER).get("base_model_name_or_path")
    if has_weights:
        raise ModelError(
            f"{folder} holds weights and an adapter ({_ADAPTER}), and says not which are meant; "
            "move the adapter to a folder of its own, or merge it into the weights (peft: "
            "merge_and_unload)"
        )
    raise ModelError(
        f"{folder} holds an adapter alone, of the base model {base!r}; merge it into that (peft: "
        "merge_and_unload, save_pretrained) and serve the result"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can not be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found


def _object(found: dict[str, Any], field: str, file: str) -> dict[str, Any] | None:
    given = found.get(field)
    if given is not None and not isinstance(given, dict):
        raise ModelError(f"{field} in {file} is {given!r}; it must be a JSON object")
    return given


def quantization(config: dict[str, Any]) -> str | None:
    """Return how the weights of a checkpoint are quantized, by its config; None: they are not.

    Raises
    ------
    ModelError
        In a way that can not be undone while they load; says what to serve instead.
    """
    field, file = "quantization_config", "config.json"
    given = _object(config, field, file)
    if given is None:
        given = _object(_object(config, "text_config", file) or {}, field, file)
    if given is None:
        return None
    method = str(given.get("quant_method", "an unknown method"))
    if method != "fp8":
        raise ModelError(
            f"the checkpoint is quantized by {method}; supported: weights in float32, bfloat16 or "
            "float16, fp8 in blocks, and GGUF files. Serve the checkpoint that it was made from "
            "(with --load-in-4bit on a GPU, if it is too large), or a GGUF file of it"
        )
    return method


def _check_numbers(path: Path, quantized: str | None) -> None:
    """Refuse what transformers would take for weights as it stands: quantized ones."""
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.parent} can not be loaded: {error}") from error
    allowed = _FLOATS if quantized is None else _FLOATS | _FP8
    for name, kind in sorted(kinds.items()):
        if kind not in allowed:
            raise ModelError(
                f"{name} in {path.name} is of type {kind}; supported: weights in float32, bfloat16 "
                "or float16"
            )


def _folder_revision(folder: Path, shards: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    names = {path.name for suffix in ("*.json", "*.jinja") for path in folder.glob(suffix)}
    names |= {name for name in _TOKENIZERS if (folder / name).is_file()}
    names |= {shard.name for shard in shards}
    for name in sorted(names):
        whole.update(f"{name}\0{_digest(folder / name)}\n".encode())
    return f"sha256:{whole.hexdigest()[:12]}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
