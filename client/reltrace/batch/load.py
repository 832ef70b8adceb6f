"""Batches read back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from reltrace_proto.stores import is_opened_unasked, url_fault

from reltrace.batch.folder import read_manifest
from reltrace.batch.journal import NAME, Failed, Journal
from reltrace.batch.parts import name_of, open_part
from reltrace.storage.trace_files import tensors_of
from reltrace.types.errors import invalid
from reltrace.types.trace import Trace

_OPEN_PARTS = 8
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")


class Batch:
    """The traces of a folder that `reltrace batch` wrote, in the order of the prompts.

    Traces are read when they are asked for; in memory are their locations (12 bytes each) and the
    files that were used last. `len(batch)` is the number of traces, and `batch[i]` the i-th.

    Parameters
    ----------
    folder : path
        The folder.
    output_uri : str or sequence of str
        Further folders whose tensors may be read; see `load_batch`.

    Attributes
    ----------
    manifest : dict
        Settings, versions and provenance of the batch.

    Raises
    ------
    InvalidArgument
        If the folder holds no batch, or it is damaged.
    """

    def __init__(
        self, folder: str | os.PathLike[str], output_uri: str | Sequence[str] = ()
    ) -> None:
        root = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(root)
        self._stored_in = [*self._own_store(), *_given_stores(output_uri)]
        self._folders = sorted(
            entry
            for entry in (root, *root.iterdir())
            if (entry == root or _SHARD.fullmatch(entry.name)) and (entry / NAME).exists()
        )
        tables = [np.empty((0, 4), np.int64)]
        for number, path in enumerate(self._folders):
            with closing(Journal(path)) as journal:
                found = journal.traces()
            # A prompt with several targets has as many traces, in rows one after the other.
            begin = np.repeat(np.cumsum(found["traces"]) - found["traces"], found["traces"])
            rows = np.repeat(found, found["traces"])
            row = rows["row"] + np.arange(len(rows)) - begin
            folders = np.full(len(rows), number)
            tables.append(np.stack([rows["number"], folders, rows["part"], row], axis=1))
        table = np.concatenate(tables)
        table = table[np.argsort(table[:, 0], kind="stable")]
        # Of each trace: its folder, part and row.
        self._rows = table[:, 1:].astype(np.int32)
        self._part = lru_cache(_OPEN_PARTS)(self._open_part)

    def _own_store(self) -> list[str]:
        """Return the folder of its tensors, if it has one that is opened unasked.

        The batch may be a stranger's, who does not choose how its tensors are reached.
        """
        uri = str(self.manifest["settings"].get("output_uri") or "").rstrip("/")
        return [uri] if is_opened_unasked(uri) else []

    @property
    def errors(self) -> list[Failed]:
        """The prompts that failed, in their order."""
        found: list[Failed] = []
        for path in self._folders:
            with closing(Journal(path)) as journal:
                found += journal.failures()
        return sorted(found, key=lambda failed: failed.index)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Trace:
        if not -len(self) <= number < len(self):
            raise IndexError(f"the batch has {len(self)} traces, and no {number}")
        folder, part, row = self._rows[number].tolist()
        return self._part(folder, part)(row)

    def __iter__(self) -> Iterator[Trace]:
        for number in range(len(self)):
            yield self[number]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return the traces as plain rows, for `datasets` and data frames.

        Each has "id", "tokens", "token_ids", "target", "logit", "position", "layers", and the
        array of each site (or "site/part") by its name.

        Examples
        --------
        >>> datasets.Dataset.from_generator(reltrace.load_batch("out").rows)
        """
        for trace in self:
            yield {
                "id": trace.id,
                "tokens": trace.tokens,
                "token_ids": trace.token_ids,
                "target": trace.target.token,
                "logit": trace.target.logit,
                "position": trace.target.position,
                "layers": list(trace.layers),
                **tensors_of(trace),
            }

    def _open_part(self, folder: int, part: int) -> Callable[[int], Trace]:
        name = name_of(part, self.manifest["settings"]["format"])
        return open_part(self._folders[folder] / name, self._stored_in)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel; `datasets` pickles what its generators hold.
        return {name: value for name, value in self.__dict__.items() if name != "_part"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._part = lru_cache(_OPEN_PARTS)(self._open_part)

    def __repr__(self) -> str:
        files = len(np.unique(self._rows[:, :2], axis=0))
        return f"Batch({len(self)} traces in {files} files, {len(self.errors)} errors)"


def _given_stores(output_uri: str | Sequence[str]) -> list[str]:
    stores = [output_uri] if isinstance(output_uri, str) and output_uri else list(output_uri)
    for uri in stores:
        if fault := url_fault(uri):
            raise invalid("output_uri", f"{fault}, not {uri!r}")
    return [uri.rstrip("/") for uri in stores]
