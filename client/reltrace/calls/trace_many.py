"""Many items through the service: batches in, results out, a bounded number in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from reltrace_proto.v1 import types_pb2

from reltrace.calls.pinning import Pins
from reltrace.calls.source import Source
from reltrace.transport.connection import Connection, Deadline
from reltrace.transport.submission import Entry, Rejected, deliveries, submit
from reltrace.types.checks import check_id
from reltrace.types.errors import InvalidArgument, NotFound, TraceError
from reltrace.types.failure import Failure
from reltrace.types.request import Arguments, JobMaker
from reltrace.types.trace import Trace

Result: TypeAlias = Trace | list[Trace] | Failure

# A submission is one message, one stream and one acknowledgement for all of its jobs.
_BATCH_JOBS = 256
_BATCH_BYTES = 1024 * 1024
# With as many in flight as may be, the next submission waits so long for more jobs: each costs the
# server as much as dozens of jobs. No longer, for the next result in order may be among them.
_LINGER = 0.02
# A source that trickles makes small submissions: past this many, they grow instead.
_OPEN_SUBMISSIONS = 64
# Finished results that nobody has taken: past this, streams are not read on.
_HELD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Pending:
    """An item on its way: its place among the items, and its job."""

    index: int
    entry: Entry
    bytes: int


@dataclass(slots=True)
class _Batch:
    """Jobs for the next submission."""

    pending: list[_Pending] = field(default_factory=list)
    bytes: int = 0

    def fits(self, size: int) -> bool:
        return not self.pending or (
            len(self.pending) < _BATCH_JOBS and self.bytes + size <= _BATCH_BYTES
        )

    def add(self, item: _Pending) -> None:
        self.pending.append(item)
        self.bytes += item.bytes


class ManyRun:
    """One `trace_many`: pulls items, submits them in batches, hands results out.

    Parameters
    ----------
    connection : Connection
        The server.
    source : Source
        The items.
    defaults : Arguments
        What an item does not say.
    ordered : bool
        Results in the order of the items.
    max_in_flight : int
        Most items pulled from the source whose results have not been taken.
    priority : Priority
        Of all jobs, as on the wire.
    deadline : Deadline
        For the whole run.
    pins : Pins
        Which revisions its jobs ask for.
    """

    def __init__(
        self,
        connection: Connection,
        source: Source,
        defaults: Arguments,
        *,
        ordered: bool,
        max_in_flight: int,
        priority: types_pb2.Priority.ValueType,
        deadline: Deadline,
        pins: Pins,
    ) -> None:
        self._connection = connection
        self._source = source
        self._jobs = JobMaker(defaults)
        self._ordered = ordered
        self._limit = max_in_flight
        self._priority = priority
        self._deadline = deadline
        self._pins = pins
        self._slots = asyncio.Semaphore(_OPEN_SUBMISSIONS)
        self._feeder: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._submissions: set[asyncio.Task[None]] = set()
        self._fatal: BaseException | None = None
        self._source_error: Exception | None = None
        # Results with their sizes: ready to be taken, and waiting for their turn.
        self._ready: deque[tuple[Result, int]] = deque()
        self._early: dict[int, tuple[Result, int]] = {}
        self._next_index = 0
        self._open = 0
        self._held_bytes = 0
        self._taken = 0
        self._taken_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def take(self) -> list[Result]:
        """Return the results that are there, at least one; none: all items are done.

        The items of the call before count as taken from now on.

        Raises
        ------
        TraceError
            If the run can not go on. What came before has been returned.
        Exception
            What the source raised, after all results of the items it gave.
        """
        if self._feeder is None:
            self._feeder = self._start(self._feed())
            self._watch = self._start(self._pins.watch())
        self._open -= self._taken
        self._held_bytes -= self._taken_bytes
        self._taken = self._taken_bytes = 0
        self._room.set()
        while not self._ready:
            if self._fatal is not None:
                raise self._fatal
            if self._feeder.done() and not self._submissions:
                if self._source_error is not None:
                    raise self._source_error
                return []
            self._news.clear()
            try:
                # Not wait_for: that of Python 3.11 loses a cancellation that comes with the news.
                async with asyncio.timeout(self._deadline.remaining()):
                    await self._news.wait()
            except TimeoutError:
                raise self._deadline.error() from None
        # A part of what may be in flight: the rest goes on while the caller works on these.
        count = min(len(self._ready), max(1, self._limit // 8))
        taken = [self._ready.popleft() for _ in range(count)]
        self._taken = count
        self._taken_bytes = sum(size for _, size in taken)
        return [result for result, _ in taken]

    async def close(self) -> None:
        """Stop: nothing is pulled, submitted or read any more."""
        tasks = [*self._submissions, *filter(None, (self._feeder, self._watch))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._source.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._submissions.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fatal = self._fatal or error
        self._news.set()

    async def _feed(self) -> None:
        batch = _Batch()
        index = 0
        while True:
            room = self._limit - self._open
            if room <= 0:
                if not await self._has_room(_LINGER if batch.pending else None):
                    batch = await self._flush(batch)
                continue
            try:
                items = await self._source.take(min(room, _BATCH_JOBS), wait=not batch.pending)
            except Exception as error:
                self._source_error = error
                items = None
            if not items:
                batch = await self._flush(batch)
                if items is None:
                    return
                continue
            self._open += len(items)
            for item in items:
                pending = self._prepare(index, item)
                index += 1
                if pending is None:
                    continue
                if not batch.fits(pending.bytes):
                    batch = await self._flush(batch)
                batch.add(pending)
            if len(batch.pending) >= _BATCH_JOBS:
                batch = await self._flush(batch)

    async def _has_room(self, patience: float | None) -> bool:
        """Wait until something of what is on its way has been taken; return whether it was."""
        self._room.clear()
        if self._open < self._limit:
            return True
        try:
            # See `take`: `close` cancels once, and a feeder that missed it would go on for ever.
            async with asyncio.timeout(patience):
                await self._room.wait()
        except TimeoutError:
            return False
        return True

    def _prepare(self, index: int, item: object) -> _Pending | None:
        name: str | int = index
        try:
            if isinstance(item, Mapping):
                name = check_id(item.get("id", index), "id")
            job = self._jobs.job(item)
        except TraceError as error:
            self._emit(index, Failure(name, error), 0)
            return None
        return _Pending(index, Entry(job, name), job.spec.ByteSize())

    async def _flush(self, batch: _Batch) -> _Batch:
        if batch.pending:
            await self._slots.acquire()
            task = self._start(self._run(batch.pending))
            self._submissions.add(task)
            task.add_done_callback(lambda _: self._slots.release())
        return _Batch()

    async def _run(self, pending: list[_Pending]) -> None:
        """Bring one batch to its end: submit it, without what is rejected, and read it."""
        pending = [item for item in pending if await self._pinned(item)]
        while pending:
            entries = [item.entry for item in pending]
            try:
                answer = await submit(self._connection, entries, self._deadline, self._priority)
            except InvalidArgument as error:
                # About the submission as a whole: no job of it can be told from the others.
                answer = Rejected(dict.fromkeys(range(len(pending)), error))
            if not isinstance(answer, Rejected):
                break
            for index, rejection in answer.errors.items():
                self._fail(pending[index], rejection)
            pending = [item for i, item in enumerate(pending) if i not in answer.errors]
        else:
            return
        waiting = {item.index for item in pending}
        stream = deliveries(
            self._connection, answer, entries, self._deadline, lambda: self._wait(waiting)
        )
        try:
            async with aclosing(stream):
                async for delivery in stream:
                    item = pending[delivery.index]
                    waiting.discard(item.index)
                    if isinstance(delivery.outcome, TraceError):
                        self._fail(item, delivery.outcome)
                        continue
                    traces = delivery.outcome
                    assert isinstance(traces, list)
                    result = traces if item.entry.job.several else traces[0]
                    self._emit(item.index, result, delivery.bytes)
        except NotFound as error:
            # The results expired, or the server lost its store: these jobs, not the run.
            for item in pending:
                if item.index in waiting:
                    self._fail(item, error)

    async def _pinned(self, item: _Pending) -> bool:
        """Have a job ask for the run's revision of its model; return whether it can."""
        spec = item.entry.job.spec
        try:
            spec.model = await self._pins.route(spec.model, self._deadline)
        except InvalidArgument as error:
            self._fail(item, error)
            return False
        return True

    async def _wait(self, waiting: set[int]) -> None:
        """Wait until results may be read on.

        The stream that brings the next result in order is held up only while there are results
        to be taken: once they are gone, it is what all others wait for.
        """
        while self._held_bytes > _HELD_BYTES and not (
            self._ordered and not self._ready and self._next_index in waiting
        ):
            self._room.clear()
            await self._room.wait()

    def _fail(self, item: _Pending, error: TraceError) -> None:
        name = item.entry.id if item.entry.id is not None else item.index
        self._emit(item.index, Failure(name, error), 0)

    def _emit(self, index: int, result: Result, size: int) -> None:
        self._held_bytes += size
        if self._ordered:
            self._early[index] = (result, size)
            while (early := self._early.pop(self._next_index, None)) is not None:
                self._ready.append(early)
                self._next_index += 1
            # The stream that brings the next one may be among those that wait.
            self._room.set()
        else:
            self._ready.append((result, size))
        if self._ready:
            self._news.set()
