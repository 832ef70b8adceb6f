"""Results on their way to disk, in a thread of their own: the network does not wait for a sync."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain

from reltrace.batch import parts
from reltrace.batch.folder import ERRORS, Folder, OtherOrigin
from reltrace.batch.journal import Commit, Failed, Journal, json_line, ranges
from reltrace.storage.atomic_files import UNFINISHED, append_durably, finish, named, write_whole
from reltrace.storage.stored_arrays import StoredArrays
from reltrace.types.errors import TraceError, invalid
from reltrace.types.trace import Trace

# Of results that wait to be written: more of them make the reader wait.
_WAITING_BYTES = 64 * 1024 * 1024
# Of one part and the failures beside it, and of failures in one line of the journal.
_PART_BYTES = 64 * 1024 * 1024
_FAILURES = 1024


@dataclass(frozen=True, slots=True)
class Traced:
    """A prompt and its traces.

    Attributes
    ----------
    index, line : int
        Its place among the prompts, from 0, and in the file, from 1.
    traces : tuple of Trace
        At least one.
    own_model : bool
        The prompt said itself which model.
    head : int
        Bytes of what describes the traces, which a safetensors file has in its head.
    bytes : int
        Of all that is kept of them.
    """

    index: int
    line: int
    traces: tuple[Trace, ...]
    own_model: bool = False
    head: int = field(init=False)
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", sum(map(parts.head_bytes, self.traces)))
        arrays = sum(map(_array_bytes, self.traces))
        object.__setattr__(self, "bytes", self.head + arrays)


def _array_bytes(trace: Trace) -> int:
    if isinstance(trace.arrays, StoredArrays):
        # They stay where they are.
        return 0
    return sum(array.nbytes for parts in trace.arrays.values() for array in parts.values())


class Writer:
    """Collects results and commits them: many at a time, and none later than after some seconds.

    Parameters
    ----------
    folder : Folder
        Where to; it is held.
    part_format : str
        Of the files of traces.
    first_part : int
        Number of the next part.
    read : callable
        Returns how many prompts have been read, and their digest.
    most_traces : int
        Of one part.
    most_seconds : float
        That a result may wait for its commit.
    """

    def __init__(
        self,
        folder: Folder,
        part_format: parts.PartFormat,
        first_part: int,
        read: Callable[[], tuple[int, str]],
        *,
        most_traces: int,
        most_seconds: float,
    ) -> None:
        self._folder = folder
        self._format = part_format
        self._number = first_part
        self._read = read
        self._most_traces = most_traces
        self._most_seconds = most_seconds
        self._journal = Journal(folder.own)
        self._changed = threading.Condition()
        self._waiting: deque[Traced | Failed] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        # Only the thread's own.
        self._traced: list[Traced] = []
        self._failed: list[Failed] = []
        self._traces = self._bytes = self._head = 0
        self._oldest = 0.0
        self._origins: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="reltrace-batch-writer")
        self._thread.start()

    def put(self, result: Traced | Failed) -> None:
        """Hand a result over; waits while too much is waiting already.

        Raises
        ------
        Exception
            What made an earlier commit fail.
        """
        size = result.bytes
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._waiting_bytes
                or self._waiting_bytes + size <= _WAITING_BYTES
            )  # fmt: skip
            if self._error is not None:
                raise self._error
            self._waiting.append(result)
            self._waiting_bytes += size
            self._changed.notify_all()

    def close(self) -> None:
        """Commit what was handed over, and stop.

        Raises
        ------
        Exception
            What made a commit fail.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                taken, last = self._take()
                for result in taken:
                    if self._has_no_room(result):
                        self._commit()
                    self._collect(result)
                    if self._full():
                        self._commit()
                if last or self._is_time():
                    self._commit()
                if last:
                    return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> tuple[list[Traced | Failed], bool]:
        """Wait for results, or for the time of the next commit."""
        patience = None
        if self._pending():
            patience = max(0.0, self._oldest + self._most_seconds - time.monotonic())
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing, patience)
            taken = list(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._changed.notify_all()
            return taken, self._closing

    def _is_time(self) -> bool:
        return self._pending() and time.monotonic() - self._oldest >= self._most_seconds

    def _pending(self) -> bool:
        return bool(self._traced or self._failed)

    def _full(self) -> bool:
        return (
            self._traces >= self._most_traces
            or self._bytes >= _PART_BYTES
            or len(self._failed) >= _FAILURES
        )

    def _has_no_room(self, result: Traced | Failed) -> bool:
        """Tell whether the part would be too large with one more: its head has a limit."""
        most = parts.MOST_HEAD_BYTES
        return isinstance(result, Traced) and self._head + result.head > most >= result.head

    def _collect(self, result: Traced | Failed) -> None:
        if not self._pending():
            self._oldest = time.monotonic()
        if isinstance(result, Failed):
            self._failed.append(result)
            self._bytes += result.bytes
            return
        if self._format == "safetensors" and result.head > parts.MOST_HEAD_BYTES:
            several = len(result.traces) > 1
            error = invalid(
                "target" if several else "prompt",
                f"the tokens and ids of its {len(result.traces)} traces take {result.head} bytes, "
                f"and the head of a safetensors file at most {parts.MOST_HEAD_BYTES}; "
                f"{'trace fewer targets of it, or ' if several else ''}use --format parquet",
            )
            self._fail(result, error)
            return
        for trace in result.traces:
            # Thousands of traces share the object that says where they come from.
            if id(trace.provenance) in self._origins:
                continue
            try:
                self._folder.check_origin(trace.provenance)
            except OtherOrigin as error:
                if not result.own_model:
                    raise
                self._fail(result, invalid("model", f"this prompt has its own: {error}"))
                return
            self._origins.add(id(trace.provenance))
        self._traced.append(result)
        self._traces += len(result.traces)
        self._bytes += result.bytes
        self._head += result.head

    def _fail(self, result: Traced, error: TraceError) -> None:
        """Take a prompt for a failed one whose traces this folder can not hold."""
        name = result.traces[0].id
        assert name is not None
        failed = Failed.of(result.index, result.line, name, error)
        self._failed.append(failed)
        self._bytes += failed.bytes

    def _commit(self) -> None:
        """Make the collected results durable: the traces first, then the line that names them."""
        if not self._pending():
            return
        traced = sorted(self._traced, key=lambda one: one.index)
        name = self._write_part(traced) if traced else None
        counts = [len(one.traces) for one in traced]
        read, digest = self._read()
        self._journal.append(
            Commit(
                part=name,
                done=ranges(one.index for one in traced),
                traces=counts if any(count != 1 for count in counts) else [],
                failed=self._failed,
                read=read,
                digest=digest,
            )
        )
        if self._failed:
            append_durably(self._folder.own / ERRORS, b"".join(map(error_line, self._failed)))
        if traced:
            self._number += 1
        self._traced, self._failed = [], []
        self._traces = self._bytes = self._head = 0
        # What is gone may have made room for another object with its number.
        self._origins.clear()

    def _write_part(self, traced: list[Traced]) -> str:
        path = self._folder.own / parts.name_of(self._number, self._format)
        unfinished = path.with_name(path.name + UNFINISHED)
        with named(unfinished):
            parts.write(unfinished, [(one.index, trace) for one in traced for trace in one.traces])
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        finish(unfinished, path)
        return path.name


def write_errors(folder: Folder, failed: Iterable[Failed]) -> None:
    """Write the file of failed prompts anew; where none has ever failed, there is no file."""
    path, failed = folder.own / ERRORS, iter(failed)
    first = next(failed, None)
    if first is not None:
        write_whole(path, map(error_line, chain([first], failed)))
    elif path.exists():
        write_whole(path, [])


def error_line(failed: Failed) -> bytes:
    """Return a line of JSON."""
    return json_line(asdict(failed))
