"""Where a model comes from: a folder, a GGUF file or a hub id; and its revision."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from reltrace_worker.models.folder import ADAPTER, INDEX, TOKENIZERS, WEIGHTS, index_shards
from reltrace_worker.types.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DIGEST_LENGTH = len("sha256:") + 12


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine: a folder, or a GGUF file."""

    path: Path
    # Hub id, name of the folder, or name of the file without its ending.
    name: str
    # Of a hub model.
    commit: str | None = None
    # Of a GGUF file: how the digest of its contents must begin.
    digest: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    def revision(self, shards: Iterable[Path] = ()) -> str:
        """Return the commit, or ``"sha256:"`` and 12 hex digits, for which all files are read.

        That of a folder is over the names and contents of its weight files `shards`, its config and
        tokenizer files and its chat template.
        """
        if self.commit is not None:
            return self.commit
        if not self.is_gguf:
            return _folder_digest(self.path, shards)
        digest = f"sha256:{_file_digest(self.path)}"
        if self.digest is not None and not digest.startswith(self.digest):
            raise ModelError(f"{self.path} is {digest}, not {self.digest}: another file")
        return digest[:_DIGEST_LENGTH]


def find_source(source: str, revision: str | None) -> Source:
    """Find a checkpoint; one of the hub is downloaded, unless it is in the cache."""
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
        return Source(path, path.stem, digest=revision)
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
    # The small files first: they say what the weights are called. The second download is of the
    # commit that the first one found, for a branch may move meanwhile.
    folder = _download(source, revision, ["*.json", "*.jinja", "tokenizer.model"])
    weights = {WEIGHTS}
    if (folder / INDEX).is_file():
        weights.update(index_shards(folder))
    if not (folder / ADAPTER).is_file():
        folder = _download(source, folder.name, sorted(weights))
    return Source(folder, source, commit=folder.name)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    """Return the folder of some files of a hub model; its name is their commit."""
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns="*/*")
        )
    # The errors of the hub say what to do: to ask for access, to give a token, to be online.
    except (HfHubHTTPError, OSError, ValueError) as error:
        at = "" if revision is None else f" at {revision!r}"
        reason = " ".join(str(error).split())
        raise ModelError(
            f"there is no folder {name!r}, and as a hub id{at} it can not be loaded: {reason}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _folder_digest(folder: Path, shards: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    names = {path.name for suffix in ("*.json", "*.jinja") for path in folder.glob(suffix)}
    names |= {name for name in TOKENIZERS if (folder / name).is_file()}
    names |= {shard.name for shard in shards}
    for name in sorted(names):
        whole.update(f"{name}\0{_file_digest(folder / name)}\n".encode())
    return f"sha256:{whole.hexdigest()}"[:_DIGEST_LENGTH]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
