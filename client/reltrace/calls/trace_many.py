"""Traces many items: submits them in batches, a bounded number at a time, and reads results."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Container, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from reltrace.calls.pinning import Pins
from reltrace.calls.source import open_source
from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.transport.results import stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import Rejected, submit
from reltrace.types.checks import check_id, whole_number
from reltrace.types.errors import Failure, InvalidArgument, NotFound, TraceError
from reltrace.types.request import Arguments, Job, JobMaker, Priority, wire_priority
from reltrace.types.trace import Trace

Result: TypeAlias = Trace | list[Trace] | Failure

# A submission is one message, one stream and one acknowledgement for all of its jobs.
_BATCH_JOBS = 256
_BATCH_BYTES = 1024 * 1024
_JOBS_FIELD = "jobs"
# With the limit in flight, a submission waits so many seconds for more jobs, since it costs the
# server as much as dozens of jobs. Not longer, since the next result in order may be one of them.
_LINGER = 0.02
# A slow source makes small submissions; with this many of them in flight, the next one grows.
_MAX_SUBMISSIONS = 64
# Streams pause while results that nobody has taken have more bytes than this.
_MAX_UNREAD_BYTES = 256 * 1024 * 1024


@dataclass(slots=True)
class _Batch:
    """Jobs of the next submission, by the index of their item."""

    most: int
    jobs: dict[int, Job] = field(default_factory=dict)
    bytes: int = 0

    def add(self, index: int, job: Job) -> bool:
        """Add a job; return False if there is no room for it."""
        size = job.spec.ByteSize()
        full = len(self.jobs) >= self.most or self.bytes + size > _BATCH_BYTES
        if self.jobs and full:
            return False
        self.jobs[index] = job
        self.bytes += size
        return True


class TraceManyRun:
    """One call of `trace_many`: pulls items, submits them in batches, and returns results.

    Raises `InvalidArgument` if an argument is wrong that all items share. `pins` are given if this
    is part of a larger run.
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
        self._connection = connection
        self._source = open_source(items)
        self._jobs = JobMaker(defaults)
        self._ordered = ordered
        self._limit = whole_number(max_in_flight, "max_in_flight", 1)
        self._priority = wire_priority(priority)
        self._deadline = deadline
        self._pins = pins or Pins(connection)
        self._batch_jobs = _BATCH_JOBS
        self._slots = asyncio.Semaphore(_MAX_SUBMISSIONS)
        self._feeder: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._submissions: set[asyncio.Task[None]] = set()
        self._fatal: BaseException | None = None
        self._source_error: Exception | None = None
        # Results with their sizes: those to be taken, and, if ordered, those that came early.
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
        """Return the results that have arrived, at least one; an empty list at the end.

        The results of the previous call count as taken from now on. An exception of the source is
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
                # Not wait_for: in Python 3.11 it loses a cancellation that comes with the event.
                async with asyncio.timeout(self._deadline.remaining()):
                    await self._result_ready.wait()
            except TimeoutError:
                raise self._deadline.error() from None
        # Only a part of the limit: the rest stays in flight while the caller works on these.
        count = min(len(self._ready), max(1, self._limit // 8))
        taken = [self._ready.popleft() for _ in range(count)]
        self._taken = count
        self._taken_bytes = sum(size for _, size in taken)
        return [result for result, _ in taken]

    async def close(self) -> None:
        """Stop pulling, submitting and reading."""
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
        batch = _Batch(self._batch_jobs)
        index = 0
        while True:
            free = self._limit - self._in_flight
            if free <= 0:
                if not await self._wait_taken(_LINGER if batch.jobs else None):
                    batch = await self._flush(batch)
                continue
            try:
                items = await self._source.take(min(free, _BATCH_JOBS), wait=not batch.jobs)
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
                job = self._job(index, item)
                if job is not None and not batch.add(index, job):
                    batch = await self._flush(batch)
                    batch.add(index, job)
                index += 1
            if len(batch.jobs) >= batch.most:
                batch = await self._flush(batch)

    async def _wait_taken(self, patience: float | None) -> bool:
        """Wait until the caller has taken a result; return False if none was taken in time."""
        self._result_taken.clear()
        if self._in_flight < self._limit:
            return True
        try:
            # Not wait_for, as in `take`: a feeder that lost its cancellation would never end.
            async with asyncio.timeout(patience):
                await self._result_taken.wait()
        except TimeoutError:
            return False
        return True

    def _job(self, index: int, item: object) -> Job | None:
        """Return the job of an item; None if the item is invalid, which is a result."""
        item_id: str | int = index
        try:
            if isinstance(item, Mapping):
                item_id = check_id(item.get("id", index), "id")
            return self._jobs.job(item, item_id)
        except TraceError as error:
            self._emit(index, Failure(item_id, error))
            return None

    async def _flush(self, batch: _Batch) -> _Batch:
        if batch.jobs:
            await self._slots.acquire()
            task = self._submit(batch.jobs)
            task.add_done_callback(lambda _: self._slots.release())
        return _Batch(self._batch_jobs)

    def _submit(self, batch: dict[int, Job]) -> asyncio.Task[None]:
        task = self._start(self._run(batch))
        self._submissions.add(task)
        return task

    async def _run(self, batch: dict[int, Job]) -> None:
        """Submit the jobs of one batch, without those that are rejected, and read their results."""
        jobs = {index: job for index, job in batch.items() if await self._pin_revision(index, job)}
        answer: Submission | Rejected
        while jobs:
            indices = list(jobs)
            try:
                answer = await submit(
                    self._connection, list(jobs.values()), self._deadline, self._priority
                )
            except InvalidArgument as error:
                if len(jobs) > 1 and any(v.field == _JOBS_FIELD for v in error.violations):
                    # So many never fit the server's bounds.
                    half = (len(jobs) + 1) // 2
                    self._batch_jobs = min(self._batch_jobs, half)
                    for part in (indices[:half], indices[half:]):
                        self._submit({index: jobs[index] for index in part})
                    return
                # The submission as a whole is at fault, so every job of it fails.
                answer = Rejected(dict.fromkeys(range(len(jobs)), error))
            if not isinstance(answer, Rejected):
                await self._read(answer, jobs)
                return
            for position, rejection in answer.errors.items():
                self._fail(indices[position], jobs.pop(indices[position]), rejection)

    async def _read(self, submission: Submission, jobs: dict[int, Job]) -> None:
        """Read the results of a submission."""
        indices = list(jobs)
        waiting = dict(jobs)
        stream = stream_results(
            self._connection,
            submission,
            list(jobs.values()),
            self._deadline,
            throttle=lambda: self._throttle(waiting),
        )
        try:
            async with aclosing(stream):
                async for result in stream:
                    index = indices[result.index]
                    job = waiting.pop(index)
                    if isinstance(result.outcome, TraceError):
                        self._fail(index, job, result.outcome)
                        continue
                    traces = result.outcome
                    assert isinstance(traces, list)
                    self._emit(index, traces if job.several else traces[0], result.bytes)
        except NotFound as error:
            # The results expired, or the server lost its store: these jobs fail, not the run.
            for index, job in waiting.items():
                self._fail(index, job, error)

    async def _pin_revision(self, index: int, job: Job) -> bool:
        """Have a job ask for the run's revision of its model; return whether it can."""
        try:
            job.spec.model = await self._pins.route(job.spec.model, self._deadline)
        except InvalidArgument as error:
            self._fail(index, job, error)
            return False
        return True

    async def _throttle(self, waiting: Container[int]) -> None:
        """Wait until further results may be read, by the stream of the `waiting` items.

        If results are ordered, the stream that brings the next one waits only while there are
        results to be taken: without them, all other streams wait for it.
        """
        while self._unread_bytes > _MAX_UNREAD_BYTES and not (
            self._ordered and not self._ready and self._next_index in waiting
        ):
            self._result_taken.clear()
            await self._result_taken.wait()

    def _fail(self, index: int, job: Job, error: TraceError) -> None:
        assert job.id is not None
        self._emit(index, Failure(job.id, error))

    def _emit(self, index: int, result: Result, size: int = 0) -> None:
        self._unread_bytes += size
        if self._ordered:
            self._early[index] = (result, size)
            while (early := self._early.pop(self._next_index, None)) is not None:
                self._ready.append(early)
                self._next_index += 1
            # The stream that brings the next result may be waiting in `_throttle`.
            self._result_taken.set()
        else:
            self._ready.append((result, size))
        if self._ready:
            self._result_ready.set()
