"""The folder of a batch: whose it is, with which settings, and what is in it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import reltrace
from reltrace.batch.journal import NAME as JOURNAL
from reltrace.batch.parts import PartFormat, is_name
from reltrace.calls.pinning import only, route_of
from reltrace.storage.atomic_files import UNFINISHED, held, named, write_whole
from reltrace.types.checks import check_same_settings
from reltrace.types.errors import TraceError, invalid
from reltrace.types.provenance import Provenance
from reltrace.types.request import Dtype
from reltrace.types.server_info import Model

MANIFEST = "manifest.json"
ERRORS = "errors.jsonl"
SUBMISSIONS = "submissions.json"
_FORMAT = "reltrace-batch-1"
_LOCK = ".lock"
# Seconds. A manifest is written in milliseconds; a file system that is shared may be slow.
_PATIENCE = 30.0
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")

# What may not change between the traces of one batch.
_SAME = ("model", "revision", "rule", "reduction", "dtype")


class OtherOrigin(TraceError):  # noqa: N818 - like its siblings
    """A trace was made otherwise than those before it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the numbers of a batch, and how they are kept; it does not change.

    Attributes
    ----------
    model, sites, reduce, target, rule, dtype, layers, top_k, add_special_tokens
        Arguments of `trace`, as JSON holds them, for prompts that do not say otherwise.
    format : str
        Of the files of traces.
    input_format, column, id_column
        How the input is read.
    shards : int
        Over how many machines the prompts are spread.
    output_uri : str or None
        Where workers write tensors, instead of sending them.
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


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of a batch, or one machine's part of it.

    Attributes
    ----------
    root : Path
        Of the whole batch; the manifest is in it.
    own : Path
        Where this machine writes: `root`, or a folder in it.
    """

    root: Path
    own: Path

    @classmethod
    def of(cls, root: Path, shard: tuple[int, int]) -> Folder:
        """Return the folder for a machine: its number, from 1, and how many there are."""
        number, count = shard
        return cls(root, root if count == 1 else root / f"shard-{number}-of-{count}")

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder: one process at a time writes to it.

        Raises
        ------
        TraceError
            If another does, or the folder can not be used.
        """
        return held(self.own, _LOCK, "out", _busy(self.own))

    def _manifest_held(self) -> AbstractContextManager[None]:
        """Hold what several machines share, while it is read and written."""
        if self.own == self.root:
            # By `held`, and by whoever has it, for as long as a run lasts.
            return nullcontext()
        return held(self.root, _LOCK, "out", _busy(self.root), patience=_PATIENCE)

    def enter(self, settings: Settings, input_name: str) -> None:
        """Write the manifest, or check that the one that is there has the same settings.

        Raises
        ------
        InvalidArgument
            If the folder holds something else, or a batch with other settings.
        """
        with self._manifest_held():
            self._enter(settings, input_name)

    def _enter(self, settings: Settings, input_name: str) -> None:
        path = self.root / MANIFEST
        if not path.exists():
            strangers = [
                entry.name
                for entry in self.own.iterdir()
                if entry.name != _LOCK and not entry.name.endswith(UNFINISHED)
            ]
            if strangers:
                raise invalid(
                    "out",
                    f"{self.root} holds {sorted(strangers)[0]!r} and no batch; choose a new folder",
                )
            manifest = {
                "format": _FORMAT,
                "settings": asdict(settings),
                "input": input_name,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {"reltrace": reltrace.__version__, "python": platform.python_version()},
                "provenance": None,
            }
            write_whole(path, [_json(manifest)])
            return
        before = read_manifest(self.root)["settings"]
        check_same_settings(before, asdict(settings), f"{self.root} holds a batch")

    def model(self, served: Sequence[Model], asked: str | None) -> str | None:
        """Return the model that prompts are traced with: of the revision that others were.

        Parameters
        ----------
        served : sequence of Model
            What the server lists.
        asked : str or None
            How the batch names its model.

        Raises
        ------
        InvalidArgument
            If there are none, and several revisions of the model are served.
        OtherOrigin
            If other revisions alone are served.
        """
        known = read_manifest(self.root)["provenance"]
        if known is None:
            first = only(served, asked or "")
            return asked if first is None else route_of(first)
        others = [m.revision for m in served if m.workers and m.name == known["model"]]
        if others and known["revision"] not in others:
            raise _other_origin(known, "revision", ", ".join(others))
        return "@".join(filter(None, (known["model"], known["revision"])))

    def submissions(self) -> dict[str, int]:
        """Return what a run that was killed may have left on the server: see `note`."""
        try:
            found: dict[str, int] = json.loads((self.own / SUBMISSIONS).read_bytes())
        except (FileNotFoundError, ValueError):
            # Not even its name is sure to outlive a machine that loses power.
            return {}
        return found

    def note(self, submissions: Mapping[str, int]) -> None:
        """Note how many jobs each submission has that the server holds.

        It is not synced to the disk, for it is written twice for each submission. What is lost with
        the machine costs no trace: jobs that nobody waits for run to their end.
        """
        path = self.own / SUBMISSIONS
        if not submissions:
            path.unlink(missing_ok=True)
            return
        unfinished = path.with_name(path.name + UNFINISHED)
        with named(unfinished):
            unfinished.write_text(json.dumps(submissions))
            unfinished.replace(path)

    def check_origin(self, provenance: Provenance) -> None:
        """Check that a trace was made as those before it were; the first one sets how.

        Raises
        ------
        OtherOrigin
            If the server's model is another one by now.
        """
        known = read_manifest(self.root)["provenance"]
        if known is None:
            known = self._begin_with(provenance)
        check_same(known, provenance)

    def _begin_with(self, provenance: Provenance) -> dict[str, Any]:
        """Note how the traces are made, unless another machine has; return what is noted."""
        with self._manifest_held():
            manifest = read_manifest(self.root)
            if manifest["provenance"] is None:
                versions = dict(provenance.versions)
                manifest["provenance"] = {**asdict(provenance), "versions": versions}
                write_whole(self.root / MANIFEST, [_json(manifest)])
            known: dict[str, Any] = manifest["provenance"]
            return known

    def clean(self, parts: set[str]) -> None:
        """Remove what a crash left: unfinished files, and traces that were not committed.

        What a batch does not write is somebody else's, whatever it is called.
        """
        for entry in self.own.iterdir():
            name = entry.name.removesuffix(UNFINISHED)
            unfinished = name != entry.name
            ours = is_name(name) or (unfinished and name in (MANIFEST, ERRORS, SUBMISSIONS))
            if ours and entry.name not in parts and entry.is_file():
                entry.unlink()


def check_same(known: dict[str, Any], provenance: Provenance) -> None:
    """Check that a trace was made as the manifest says.

    Raises
    ------
    OtherOrigin
        If not; versions and devices may differ, and each trace names its own.
    """
    for name in _SAME:
        if known[name] != getattr(provenance, name):
            raise _other_origin(known, name, getattr(provenance, name))


def _other_origin(known: dict[str, Any], name: str, found: str) -> OtherOrigin:
    return OtherOrigin(
        f"the server's {name} is {found!r}; this batch was begun with {known[name]!r}, and mixes "
        "nothing: use another folder"
    )


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a batch.

    Raises
    ------
    InvalidArgument
        If the folder holds no batch.
    """
    path = root / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise invalid("out", f"{root} holds no batch: there is no {MANIFEST}") from None
    except ValueError as error:
        raise invalid("out", f"{path} is damaged: {error}") from error
    if manifest.get("format") != _FORMAT:
        raise invalid("out", f"{path} is of format {manifest.get('format')!r}, not {_FORMAT!r}")
    return manifest


def folders_of(root: Path) -> list[Path]:
    """Return the folders of a batch that have a journal: its own, or one per machine."""
    found = [
        entry for entry in [root, *root.iterdir()]
        if (entry is root or _SHARD.fullmatch(entry.name)) and (entry / JOURNAL).exists()
    ]  # fmt: skip
    return sorted(found)


def _busy(folder: Path) -> str:
    return f"another `reltrace batch` writes to {folder}; stop it, or choose another folder"


def _json(value: dict[str, Any]) -> bytes:
    # The name of a file may be no UTF-8; JSON escapes what stands for such a byte in it.
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"
