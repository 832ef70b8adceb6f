"""Where a model comes from: a local folder, checked and hashed, or a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from reltrace_worker.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def local_folder(source: str) -> Path | None:
    """Decide between a local folder and a hub id.

    Returns
    -------
    Path | None
        The folder; None: `source` is a hub id.

    Raises
    ------
    ModelError
        `source` is neither an existing folder nor a valid hub id.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if source and path.exists():
        raise ModelError(f"{source} is a file; a model is a folder or a hub id such as 'org/name'")
    if not source or source[0] in "./~" or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"there is no folder {source!r}, and it is no hub id either (those read 'org/name')"
        )
    return None


def check_folder(folder: Path) -> None:
    """Check that a local folder holds a config, safetensors weights and a tokenizer.

    Raises
    ------
    ModelError
        Names the file that is missing and the folder.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"config.json is missing in {folder}")
    # As transformers looks for them: a single file first.
    shards = {_WEIGHTS}
    if (folder / _WEIGHTS).is_file():
        pass
    elif (folder / _INDEX).is_file():
        try:
            shards = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{_INDEX} in {folder} can not be read: {error!r}") from error
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ModelError(f"{', '.join(missing)} (named by {_INDEX}) is missing in {folder}")
    else:
        others = sorted(
            path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix)
        )
        if others:
            raise ModelError(
                f"{folder} has weights in {others[0]} alone; supported: safetensors "
                f"({_WEIGHTS}, or {_INDEX} and its shards)"
            )
        raise ModelError(f"{_WEIGHTS} (or {_INDEX} and its shards) is missing in {folder}")
    for shard in sorted(shards):
        _check_numbers(folder / shard)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"the tokenizer is missing in {folder}: tokenizer.json or tokenizer.model")


def _check_numbers(path: Path) -> None:
    """Refuse what transformers would take for weights as it stands: quantized ones."""
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path.parent} can not be loaded: {error}") from error
    for name, kind in sorted(kinds.items()):
        if kind not in _FLOATS:
            raise ModelError(
                f"{name} in {path.name} is of type {kind}; supported: weights in float32, bfloat16 "
                "or float16"
            )


def folder_revision(folder: Path) -> str:
    """Name the contents of a local folder.

    Returns
    -------
    str
        ``"sha256:"`` and 12 hex digits, over names and contents of the weight, config and
        tokenizer files.
    """
    whole = hashlib.sha256()
    names = {path.name for suffix in ("*.safetensors", "*.json") for path in folder.glob(suffix)}
    names |= {name for name in _TOKENIZERS if (folder / name).is_file()}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{name}\0{digest}\n".encode())
    return f"sha256:{whole.hexdigest()[:12]}"
