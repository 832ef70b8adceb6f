"""Writes results to disk in a separate thread, so that the network does not wait for a sync."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from reltrace.batch import parts
from reltrace.batch.folder import ERRORS, BatchFolder, ProvenanceMismatch
from reltrace.batch.items import Item
from reltrace.batch.journal import Failed, Journal
from reltrace.storage.atomic_files import replace_file, with_filename
from reltrace.storage.stored_arrays import StoredArrays
from reltrace.types.errors import TraceError, invalid
from reltrace.types.trace import Trace

# Of results that wait to be written: with more of them, `put` blocks.
_QUEUE_BYTES = 64 * 1024 * 1024
_COMMIT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Traced:
    item: Item
    traces: tuple[Trace, ...]

    @cached_property
    def header_bytes(self) -> int:
        """In the header of a safetensors file."""
        return sum(map(parts.header_bytes, self.traces))

    @cached_property
    def size(self) -> int:
        """In bytes, about."""
        return self.header_bytes + sum(map(_array_bytes, self.traces))


def _array_bytes(trace: Trace) -> int:
    if isinstance(trace.arrays, StoredArrays):
        # They stay in their store.
        return 0
    return sum(array.nbytes for arrays in trace.arrays.values() for array in arrays.values())


class Writer:
    """Collects results and commits many at a time.

    At most `max_traces` in one file, and none later than after `max_seconds`. `input_read` returns
    how many prompts have been read, and their digest.
    """

    def __init__(
        self,
        folder: BatchFolder,
        journal: Journal,
        part_format: parts.PartFormat,
        input_read: Callable[[], tuple[int, str]],
        *,
        max_traces: int,
        max_seconds: float,
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._format = part_format
        self._input_read = input_read
        self._max_traces = max_traces
        self._max_seconds = max_seconds
        self._changed = threading.Condition()
        self._queue: deque[Traced | Failed] = deque()
        self._queue_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        # Of the next commit; only the thread uses these.
        self._next_part = 1 + max(journal.parts(), default=-1)
        self._traced: list[Traced] = []
        self._failed: list[Failed] = []
        self._traces = self._bytes = 0
        self._oldest = 0.0
        self._thread = threading.Thread(target=self._run, name="reltrace-batch-writer")
        self._thread.start()

    def put(self, result: Traced | Failed) -> None:
        """Take a result; blocks while too much waits to be written.

        Raises the error of an earlier commit.
        """
        # Before the lock: it encodes the result.
        size = result.size
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._queue_bytes
                or self._queue_bytes + size <= _QUEUE_BYTES
            )  # fmt: skip
            if self._error is not None:
                raise self._error
            self._queue.append(result)
            self._queue_bytes += size
            self._changed.notify_all()

    def close(self) -> None:
        """Commit what is left, and stop. Raises the error of a commit."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                results, closing = self._take()
                for result in results:
                    self._collect(result)
                if closing or self._seconds_left() == 0:
                    self._commit()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> tuple[list[Traced | Failed], bool]:
        """Wait for results, or until the next commit is due."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing, self._seconds_left())
            results = list(self._queue)
            self._queue.clear()
            self._queue_bytes = 0
            self._changed.notify_all()
            return results, self._closing

    def _seconds_left(self) -> float | None:
        """Return in how many seconds the next commit is due; None: there is nothing to commit."""
        if not (self._traced or self._failed):
            return None
        return max(0.0, self._oldest + self._max_seconds - time.monotonic())

    def _collect(self, result: Traced | Failed) -> None:
        if isinstance(result, Traced) and (error := self._refusal(result)) is not None:
            result = Failed.of(result.item, error)
        if self._bytes + result.size > _COMMIT_BYTES:
            self._commit()
        if not (self._traced or self._failed):
            self._oldest = time.monotonic()
        self._bytes += result.size
        if isinstance(result, Failed):
            self._failed.append(result)
        else:
            self._traced.append(result)
            self._traces += len(result.traces)
        if self._traces + len(self._failed) >= self._max_traces:
            self._commit()

    def _refusal(self, result: Traced) -> TraceError | None:
        """Return why this folder can not hold the traces of a prompt.

        Raises ProvenanceMismatch if it can not hold those of any further prompt.
        """
        if self._format == "safetensors" and result.header_bytes > parts.MAX_HEADER_BYTES:
            several = len(result.traces) > 1
            return invalid(
                "target" if several else "prompt",
                f"the tokens and ids of its {len(result.traces)} traces take {result.header_bytes} "
                f"bytes; a safetensors file has room for {parts.MAX_HEADER_BYTES} in its header: "
                f"{'trace fewer targets of it, or ' if several else ''}use --format parquet",
            )
        try:
            for trace in result.traces:
                self._folder.check_provenance(trace.provenance)
        except ProvenanceMismatch as error:
            if "model" not in result.item.arguments:
                raise
            return invalid("model", f"this prompt names another: {error}")
        return None

    def _commit(self) -> None:
        """Make the collected results durable: first the file of traces, then the journal."""
        if not (self._traced or self._failed):
            return
        traced = sorted(self._traced, key=lambda one: one.item.index)
        part = self._next_part if traced else None
        if traced:
            path = self._folder.path / parts.name_of(self._next_part, self._format)
            rows = [(one.item.index, trace) for one in traced for trace in one.traces]
            parts.write_part(path, rows)
            self._next_part += 1
        counts = [(one.item.index, len(one.traces)) for one in traced]
        self._journal.commit(part, counts, self._failed, *self._input_read())
        if self._failed:
            path = self._folder.path / ERRORS
            with with_filename(path), path.open("ab") as file:
                file.writelines(one.to_line() for one in self._failed)
        self._traced, self._failed = [], []
        self._traces = self._bytes = 0


def write_errors(folder: BatchFolder, journal: Journal) -> None:
    """Write the file of failed prompts anew; there is none if no prompt has ever failed."""
    path = folder.path / ERRORS
    if path.exists() or next(journal.failures(), None):
        with replace_file(path) as file:
            file.writelines(one.to_line() for one in journal.failures())
