"""A batch, read back."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.batch.folder import folders_of, read_manifest
from reltrace.batch.journal import Failed, Journal
from reltrace.batch.parts import Part, open_part
from reltrace.types.trace import Trace

_OPEN_PARTS = 8


class Batch:
    """The traces of a folder that `reltrace batch` wrote, in the order of the prompts.

    Traces are read when they are asked for; what is held in memory is where they are (16 bytes
    each) and the few files that were used last. `len(batch)` is the number of traces, and
    `batch[i]` the i-th of them.

    Parameters
    ----------
    folder : path
        The folder.

    Attributes
    ----------
    manifest : dict
        Settings, versions and origin of the batch.

    Raises
    ------
    InvalidArgument
        If the folder holds no batch, or it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(root)
        self._folders = folders_of(root)
        self._paths: list[Path] = []
        self._open: OrderedDict[int, Part] = OrderedDict()
        indices: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        places: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        for own in self._folders:
            for commit in Journal(own).commits():
                if commit.part is None:
                    continue
                index = np.fromiter(commit.indices(), np.int64)
                if commit.traces:
                    index = np.repeat(index, commit.traces)
                part = np.full(len(index), len(self._paths), np.int32)
                indices.append(index)
                places.append(np.stack([part, np.arange(len(index), dtype=np.int32)], axis=1))
                self._paths.append(own / commit.part)
        index = np.concatenate(indices) if indices else np.empty(0, np.int64)
        self._places = np.concatenate(places) if places else np.empty((0, 2), np.int32)
        # Stable: the traces of one prompt stay in the order of its targets.
        self._places = self._places[np.argsort(index, kind="stable")]

    @property
    def errors(self) -> list[Failed]:
        """The prompts that failed, in their order."""
        found = [failed for own in self._folders for failed in Journal(own).failures()]
        return sorted(found, key=lambda failed: failed.index)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Trace:
        if not -len(self) <= number < len(self):
            raise IndexError(f"the batch has {len(self)} traces, and no {number}")
        part, row = self._places[number]
        return self._part(int(part)).trace(int(row))

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
        from reltrace.storage.trace_files import tensors_of

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

    def _part(self, number: int) -> Part:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = open_part(self._paths[number])
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        # Files that are open do not travel; `datasets` looks at what its generators hold.
        return {**self.__dict__, "_open": OrderedDict()}

    def __repr__(self) -> str:
        return f"Batch({len(self)} traces in {len(self._paths)} files, {len(self.errors)} errors)"
