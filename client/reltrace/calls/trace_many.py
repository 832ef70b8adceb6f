"""Many items through the service: batches in, results out, a bounded number in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from reltrace.calls.pinning import Pins
from reltrace.calls.source import open_source
from reltrace.transport.connection import Connection
from reltrace.transport.results import stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import Rejected, submit
from reltrace.types.checks import check_id, whole_number
from reltrace.types.errors import InvalidArgument, NotFound, TraceError
from reltrace.types.failure import Failure
from reltrace.types.request import Arguments, Job, JobMaker, Priority, wire_priority
from reltrace.types.trace import Trace

Result: TypeAlias = Trace | list[Trace] | Failure

# A submission is one message, one stream and one acknowledgement for all of its jobs.
_BATCH_JOBS = 256
_BATCH_BYTES = 1024 * 1024
# With as many in flight as may be, the next submission waits so long for more jobs: each costs the
# server as much as dozens of jobs. No longer, for the next result in order may be among them.
_LINGER = 0.02
# A source that trickles makes small submissions: past this many, they grow instead.
_MAX_SUBMISSIONS = 64
# Finished results that nobody has taken: past this, streams are not read on.
_MAX_UNREAD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Item:
    """A job with the index of its item."""

    index: int
    job: Job
    bytes: int


@dataclass(slots=True)
class _Batch:
    """Jobs of the next submission."""

    items: list[_Item] = field(default_factory=list)
    bytes: int = 0

    def fits(self, item: _Item) -> bool:
        return not self.items or (
            len(self.items) < _BATCH_JOBS and self.bytes + item.bytes <= _BATCH_BYTES
        )

    def add(self, item: _Item) -> None:
        self.items.append(item)
        self.bytes += item.bytes


class TraceManyRun:
    """One `trace_many`: pulls items, submits them in batches, hands results out.

    Raises `InvalidArgument` if an argument is wrong that all items share. `pins` are those of a
    larger run that this one is part of.
    """

    def __init__(
        self,
        connection: Connection,
        items: object,
        defaults: Arguments,
        *,
        deadline: Deadline,
        ordered: bool = False,
        max_in_flight: int = 1024,
        priority: Priority = "interactive",
        pins: Pins | None = None,
    ) -> None:
        defaults.check_shared()
        self._connection = connection
        self._source = open_source(items)
        self._jobs = JobMaker(defaults)
        self._ordered = ordered
        self._limit = whole_number(max_in_flight, "max_in_flight", 1)
        self._priority = wire_priority(priority)
        self._deadline = deadline
        self._pins = pins or Pins(connection)
        self._slots = asyncio.Semaphore(_MAX_SUBMISSIONS)
        self._feeder: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._submissions: set[asyncio.Task[None]] = set()
        self._fatal: BaseException | None = None
        self._source_error: Exception | None = None
        # Results with their sizes: ready to be taken, and, in order, waiting for earlier ones.
        self._ready: deque[tuple[Result, int]] = deque()
        self._early: dict[int, tuple[Result, int]] = {}
        self._next_index = 0
        self._in_flight = 0
        self._unread_bytes = 0
        self._taken = 0
        self._taken_bytes = 0
        self._result_ready = asyncio.Event()
        self._result_taken = asyncio.Event()

    async def take(self) -> list[Result]:
        """Return the results that are there, at least one; none: all items are done.

        The results of the call before count as taken from now on. An exception of the source is
        raised after all results of its items.
        """
        if self._feeder is None:
            self._feeder = self._start(self._feed())
            self._watch = self._start(self._pins.watch())
        self._in_flight -= self._taken
        self._unread_bytes -= self._taken_bytes
        self._taken = self._taken_bytes = 0
        self._result_taken.set()
        while not self._ready:
            if self._fatal is not None:
                raise self._fatal
            if self._feeder.done() and not self._submissions:
                if self._source_error is not None:
                    raise self._source_error
                return []
            self._result_ready.clear()
            try:
                # Not wait_for: that of Python 3.11 loses a cancellation that comes with the news.
                async with asyncio.timeout(self._deadline.remaining()):
                    await self._result_ready.wait()
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
        self._result_ready.set()

    async def _feed(self) -> None:
        batch = _Batch()
        index = 0
        while True:
            free = self._limit - self._in_flight
            if free <= 0:
                if not await self._wait_taken(_LINGER if batch.items else None):
                    batch = await self._flush(batch)
                continue
            try:
                items = await self._source.take(min(free, _BATCH_JOBS), wait=not batch.items)
            except Exception as error:
                self._source_error = error
                items = None
            if not items:
                batch = await self._flush(batch)
                if items is None:
                    return
                continue
            self._in_flight += len(items)
            for item in items:
                prepared = self._prepare(index, item)
                index += 1
                if prepared is None:
                    continue
                if not batch.fits(prepared):
                    batch = await self._flush(batch)
                batch.add(prepared)
            if len(batch.items) >= _BATCH_JOBS:
                batch = await self._flush(batch)

    async def _wait_taken(self, patience: float | None) -> bool:
        """Wait until something of what is on its way has been taken; return whether it was."""
        self._result_taken.clear()
        if self._in_flight < self._limit:
            return True
        try:
            # See `take`: `close` cancels once, and a feeder that missed it would go on for ever.
            async with asyncio.timeout(patience):
                await self._result_taken.wait()
        except TimeoutError:
            return False
        return True

    def _prepare(self, index: int, item: object) -> _Item | None:
        item_id: str | int = index
        try:
            if isinstance(item, Mapping):
                item_id = check_id(item.get("id", index), "id")
            job = self._jobs.job(item, item_id)
        except TraceError as error:
            self._emit(index, Failure(item_id, error), 0)
            return None
        return _Item(index, job, job.spec.ByteSize())

    async def _flush(self, batch: _Batch) -> _Batch:
        if batch.items:
            await self._slots.acquire()
            task = self._start(self._run(batch.items))
            self._submissions.add(task)
            task.add_done_callback(lambda _: self._slots.release())
        return _Batch()

    async def _run(self, items: list[_Item]) -> None:
        """Submit the jobs of one batch, without those that are rejected, and read their results."""
        items = [item for item in items if await self._pin_revision(item)]
        while items:
            jobs = [item.job for item in items]
            try:
                answer = await submit(self._connection, jobs, self._deadline, self._priority)
            except InvalidArgument as error:
                # About the submission as a whole: no job of it can be told from the others.
                answer = Rejected(dict.fromkeys(range(len(items)), error))
            if not isinstance(answer, Rejected):
                break
            for index, rejection in answer.errors.items():
                self._fail(items[index], rejection)
            items = [item for i, item in enumerate(items) if i not in answer.errors]
        else:
            return
        waiting = {item.index for item in items}
        stream = stream_results(
            self._connection,
            answer,
            jobs,
            self._deadline,
            throttle=lambda: self._throttle(waiting),
        )
        try:
            async with aclosing(stream):
                async for result in stream:
                    item = items[result.index]
                    waiting.discard(item.index)
                    if isinstance(result.outcome, TraceError):
                        self._fail(item, result.outcome)
                        continue
                    traces = result.outcome
                    assert isinstance(traces, list)
                    self._emit(item.index, traces if item.job.several else traces[0], result.bytes)
        except NotFound as error:
            # The results expired, or the server lost its store: these jobs fail, not the run.
            for item in items:
                if item.index in waiting:
                    self._fail(item, error)

    async def _pin_revision(self, item: _Item) -> bool:
        """Have a job ask for the run's revision of its model; return whether it can."""
        spec = item.job.spec
        try:
            spec.model = await self._pins.route(spec.model, self._deadline)
        except InvalidArgument as error:
            self._fail(item, error)
            return False
        return True

    async def _throttle(self, waiting: set[int]) -> None:
        """Wait until results may be read on.

        The stream that brings the next result in order is held up only while there are results
        to be taken: once they are gone, it is what all others wait for.
        """
        while self._unread_bytes > _MAX_UNREAD_BYTES and not (
            self._ordered and not self._ready and self._next_index in waiting
        ):
            self._result_taken.clear()
            await self._result_taken.wait()

    def _fail(self, item: _Item, error: TraceError) -> None:
        assert item.job.id is not None
        self._emit(item.index, Failure(item.job.id, error), 0)

    def _emit(self, index: int, result: Result, size: int) -> None:
        self._unread_bytes += size
        if self._ordered:
            self._early[index] = (result, size)
            while (early := self._early.pop(self._next_index, None)) is not None:
                self._ready.append(early)
                self._next_index += 1
            # The stream that brings the next one may be among those that wait.
            self._result_taken.set()
        else:
            self._ready.append((result, size))
        if self._ready:
            self._result_ready.set()
