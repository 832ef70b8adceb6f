"""The folder of a batch: its lock, its manifest, and what a crash left in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import reltrace
from reltrace.batch.parts import PartFormat, is_name
from reltrace.calls.pinning import only, route_of
from reltrace.storage.atomic_files import (
    UNFINISHED,
    check_no_other_files,
    lock_folder,
    replace_file,
)
from reltrace.storage.damaged_files import check_kinds
from reltrace.types.checks import check_name, check_same_settings
from reltrace.types.errors import TraceError, invalid
from reltrace.types.provenance import Provenance
from reltrace.types.request import Dtype
from reltrace.types.server_info import Model

MANIFEST = "manifest.json"
ERRORS = "errors.jsonl"
SUBMISSIONS = "submissions.json"
_FORMAT = "reltrace-batch-2"
# Seconds to wait for another machine that writes the manifest.
_MANIFEST_TIMEOUT = 30.0

_SAME_PROVENANCE = ("model", "revision", "rule", "reduction", "dtype")


class ProvenanceMismatch(TraceError):  # noqa: N818 - like the other errors of a batch
    """A trace was made in another way than those before it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a batch that decide its numbers and files; fixed for its folder.

    Arguments of `trace`, as JSON holds them, for prompts that do not say otherwise; the formats of
    output and input; and the number of machines that share the prompts.
    """

    model: str | None
    sites: list[str]
    reduce: str
    target: Any
    rule: str
    dtype: Dtype
    layers: list[int] | None
    top_k: int | None
    format: PartFormat
    input_format: str
    column: str | None
    id_column: str | None
    shards: int
    output_uri: str | None = None
    add_special_tokens: bool = True


class BatchFolder:
    """The folder of a batch, for a machine: its number, from 1, and their count.

    `root` is the folder of the whole batch and holds the manifest. A single machine writes to it,
    others write to a folder in it each: `path`.
    """

    def __init__(self, root: Path, shard: tuple[int, int]) -> None:
        number, count = shard
        self.root = root
        self.path = root if count == 1 else root / f"shard-{number}-of-{count}"
        # As in the manifest; None: not read yet.
        self._provenance: Any = None

    def lock(self) -> AbstractContextManager[None]:
        """Let one process at a time write to `path`; raise TraceError if another one does."""
        return lock_folder(self.path, _busy(self.path))

    def _lock_manifest(self) -> AbstractContextManager[None]:
        if self.path == self.root:
            # Locked for the whole run.
            return nullcontext()
        return lock_folder(self.root, _busy(self.root), timeout=_MANIFEST_TIMEOUT)

    def open(self, settings: Settings, input_name: str) -> None:
        """Write the manifest, or check that there is one with the same settings.

        Raises InvalidArgument if the folder holds something else.
        """
        with self._lock_manifest():
            if (self.root / MANIFEST).exists():
                before = read_manifest(self.root)["settings"]
                check_same_settings(before, asdict(settings), f"{self.root} holds a batch")
                return
            check_no_other_files(self.path, "batch")
            self._write_manifest({
                "format": _FORMAT,
                "settings": asdict(settings),
                "input": input_name,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {"reltrace": reltrace.__version__, "python": platform.python_version()},
                "provenance": None,
            })  # fmt: skip

    def route(self, served: Sequence[Model], name: str | None) -> str | None:
        """Return the name by which jobs ask for the model, whose name in the settings is `name`.

        It includes the revision: that of the traces that are there, else the one that is served.
        Raises InvalidArgument if several revisions are served, ProvenanceMismatch if only others.
        """
        known = read_manifest(self.root)["provenance"]
        if known is None:
            model = only(served, name or "")
            return name if model is None else route_of(model)
        revisions = [m.revision for m in served if m.workers and m.name == known["model"]]
        if revisions and known["revision"] not in revisions:
            raise _mismatch(known, "revision", ", ".join(revisions))
        return "@".join(filter(None, (known["model"], known["revision"])))

    def check_provenance(self, provenance: Provenance) -> None:
        """Raise ProvenanceMismatch if a trace was made by another model, or in another way.

        Versions and devices may differ.
        """
        if self._provenance is None:
            with self._lock_manifest():
                manifest = read_manifest(self.root)
                if manifest["provenance"] is None:
                    versions = dict(provenance.versions)
                    manifest["provenance"] = {**asdict(provenance), "versions": versions}
                    self._write_manifest(manifest)
            self._provenance = manifest["provenance"]
        known = self._provenance
        for name in _SAME_PROVENANCE:
            if known[name] != getattr(provenance, name):
                raise _mismatch(known, name, getattr(provenance, name))

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        # A file name that is not UTF-8 has lone surrogates here.
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        with replace_file(self.root / MANIFEST) as file:
            file.write(text.encode(errors="backslashreplace"))

    def submissions(self) -> dict[str, int]:
        """Return the number of jobs of each submission that a killed run left on the server."""
        try:
            found: object = json.loads((self.path / SUBMISSIONS).read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            found = None
        # The file is not synced: a power failure may leave any content.
        jobs = found if isinstance(found, dict) else {}
        return {name: count for name, count in jobs.items() if type(count) is int}

    def record_submissions(self, submissions: Mapping[str, int]) -> None:
        """Record how many jobs of each submission the server holds.

        It is called twice per submission, so the file is not synced. If a power failure loses it,
        no trace is lost, but jobs of the killed run are not cancelled and run to their end.
        """
        path = self.path / SUBMISSIONS
        if not submissions:
            path.unlink(missing_ok=True)
            return
        with replace_file(path, durable=False) as file:
            file.write(json.dumps(submissions).encode())

    def remove_uncommitted(self, parts: set[str]) -> None:
        """Remove files that a crash left: unfinished ones, and all parts but `parts`.

        Files that a batch does not write stay, whatever their names are.
        """
        for entry in self.path.iterdir():
            name = entry.name.removesuffix(UNFINISHED)
            unfinished = name != entry.name
            ours = is_name(name) or (unfinished and name in (MANIFEST, ERRORS, SUBMISSIONS))
            if ours and entry.name not in parts and entry.is_file():
                entry.unlink()


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a batch; raise InvalidArgument if the folder holds none."""
    path = root / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise invalid("out", f"{root} holds no batch: there is no {MANIFEST}") from None
    except (ValueError, RecursionError) as error:
        raise invalid("out", f"{path} is damaged: {error}") from error
    if isinstance(manifest, dict) and manifest.get("format") != _FORMAT:
        raise invalid(
            "out",
            f"{path} is of format {manifest.get('format')!r}, and this version reads {_FORMAT!r}: "
            "use a new folder",
        )
    try:
        check_kinds(manifest, {"settings": dict, "provenance": (dict, NoneType)}, complete=True)
        check_kinds(manifest["settings"], {"format": str}, complete=True)
        check_kinds(manifest["settings"], {"output_uri": (str, NoneType)})
        check_name(manifest["settings"]["format"], "settings.format", get_args(PartFormat))
        if manifest["provenance"] is not None:
            check_kinds(manifest["provenance"], dict.fromkeys(_SAME_PROVENANCE, str), complete=True)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid("out", f"{path} is damaged: {error}") from error
    return manifest


def _busy(folder: Path) -> str:
    return f"another `reltrace batch` writes to {folder}; stop it, or choose another folder"


def _mismatch(known: dict[str, Any], name: str, found: str) -> ProvenanceMismatch:
    return ProvenanceMismatch(
        f"the server's {name} is {found!r}, and this batch was begun with {known[name]!r}: use "
        "another folder"
    )
