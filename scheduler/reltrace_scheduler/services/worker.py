"""WorkerService: one stream per worker, for as long as it lives."""

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from reltrace_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

from reltrace_scheduler import endings
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import InvalidRequestError, Violation
from reltrace_scheduler.metrics.counts import Counts
from reltrace_scheduler.models import ModelCache
from reltrace_scheduler.store.keys import REAPER, Keys, submission_of
from reltrace_scheduler.store.queue import LOST, STORED, Queue
from reltrace_scheduler.store.records import (
    Lease,
    LeasedJob,
    NewChunk,
    Priority,
    WorkerRecord,
)
from reltrace_scheduler.store.registry import Registry
from reltrace_scheduler.store.signals import Signals, wait
from reltrace_scheduler.store.upkeep import Upkeep
from reltrace_scheduler.tasks import end

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

_HELLO_DEADLINE = 10.0
_LOOK_AGAIN = 1.0
"""Seconds between looks at the queue while no signal comes."""
_LEASES_AT_ONCE = 256
_LEASES_BYTES = 16 << 20
_INTERACTIVE_SHARE = 4
"""One of so many leases that a worker holds is never batch."""
_LEAST_BATCH = 48
"""Fewer jobs of batch are not leased while a worker has others: a lease costs as much as dozens."""
_MOST_CREDIT = 4096

_END_STATES = {
    types_pb2.JOB_STATE_SUCCEEDED: "SUCCEEDED",
    types_pb2.JOB_STATE_FAILED: "FAILED",
}


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Leases jobs to workers and stores what they send back."""

    def __init__(
        self,
        queue: Queue,
        upkeep: Upkeep,
        registry: Registry,
        models: ModelCache,
        signals: Signals,
        settings: Settings,
        keys: Keys,
        counts: Counts,
    ) -> None:
        self._queue = queue
        self._upkeep = upkeep
        self._registry = registry
        self._models = models
        self._signals = signals
        self._settings = settings
        self._keys = keys
        self._counts = counts

    async def Work(  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.WorkRequest], context: Context
    ) -> AsyncIterator[worker_pb2.WorkResponse]:
        requests = aiter(request_iterator)
        hello = await _first(requests)
        session = Session(
            hello, self._queue, self._upkeep, self._registry, self._models, self._counts
        )
        await session.open()
        # Bounded: a worker that does not read stops being read.
        outgoing: asyncio.Queue[worker_pb2.WorkResponse | None] = asyncio.Queue(64)
        await outgoing.put(
            worker_pb2.WorkResponse(
                welcome=worker_pb2.Welcome(
                    lease=_duration(self._settings.lease),
                    heartbeat=_duration(self._settings.heartbeat),
                )
            )
        )
        with (
            self._signals.listen(self._keys.wake(session.model)) as wake,
            self._signals.listen(self._keys.revoked(session.worker_id)) as revoked,
        ):

            async def receive() -> None:
                async for request in requests:
                    if request.HasField("leave"):
                        await session.leave()
                        break
                    for response in await session.handle(request):
                        await outgoing.put(response)
                    # Room, or an empty hand, may be what a lease waited for. The room that results
                    # make is told by the worker; but where some was left, a bound on what it holds
                    # (its share, or that of batch) kept jobs from it, and now it holds less.
                    if not request.HasField("results") or session.has_room:
                        wake.set()
                await outgoing.put(None)

            async def dispatch() -> None:
                while True:
                    for leases in (messages := await session.lease()):
                        await outgoing.put(leases)
                    if not messages:
                        await wait(wake, _LOOK_AGAIN)

            async def revoke() -> None:
                while True:
                    # A signal that is missed is made up for by the worker's next heartbeat.
                    if await wait(revoked, self._settings.heartbeat):
                        for response in await session.check():
                            await outgoing.put(response)

            tasks = [asyncio.create_task(work()) for work in (receive, dispatch, revoke)]
            for task in tasks:
                # A failure must reach the writer below, which waits on the queue.
                task.add_done_callback(lambda done: _report(done, outgoing))
            try:
                while (response := await outgoing.get()) is not None:
                    yield response
                for task in tasks:
                    if task.done() and not task.cancelled():
                        task.result()
            finally:
                await end(tasks)


def _report(
    task: "asyncio.Task[None]", outgoing: "asyncio.Queue[worker_pb2.WorkResponse | None]"
) -> None:
    if task.cancelled() or task.exception() is None:
        return
    if outgoing.full():
        # The stream is lost anyway; what it carried is leased and comes back.
        outgoing.get_nowait()
    outgoing.put_nowait(None)


async def _first(requests: AsyncIterator[worker_pb2.WorkRequest]) -> worker_pb2.Hello:
    try:
        async with asyncio.timeout(_HELLO_DEADLINE):
            first = await anext(requests)
    except (TimeoutError, StopAsyncIteration):
        raise InvalidRequestError(
            Violation("hello", f"did not come within {_HELLO_DEADLINE:.0f} s")
        ) from None
    if first.WhichOneof("message") != "hello":
        raise InvalidRequestError(Violation("hello", "must be the first message"))
    hello = first.hello
    if not re.fullmatch(r"[\w.:-]{1,128}", hello.worker_id) or hello.worker_id == REAPER:
        raise InvalidRequestError(
            Violation("hello.worker_id", "must be 1 to 128 letters, digits, or any of ._:-")
        )
    if not hello.model.name or len(hello.model.name) > 256:
        raise InvalidRequestError(Violation("hello.model.name", "must have 1 to 256 characters"))
    return hello


class Session:
    """What one worker's stream may do: everything is checked against its leases."""

    def __init__(
        self,
        hello: worker_pb2.Hello,
        queue: Queue,
        upkeep: Upkeep,
        registry: Registry,
        models: ModelCache,
        counts: Counts,
    ) -> None:
        self.worker_id = hello.worker_id
        self.model = hello.model.name
        self._hello = hello
        self._queue = queue
        self._upkeep = upkeep
        self._registry = registry
        self._models = models
        self._counts = counts
        self._epoch = secrets.token_hex(8)
        self._credit = 0
        self._held: dict[Lease, str] = {}
        """Leases that the worker is known to have, with the class of their queue."""
        self._reconciled = False
        # Whoever leaves must not be leased to at the same moment.
        self._leasing = asyncio.Lock()

    @property
    def has_room(self) -> bool:
        """Whether there is room for more jobs than it got, also of batch."""
        return self._credit > 0 and self._batch_room() > 0

    def _batch_room(self) -> int:
        """Return how many jobs of batch the worker may be given; 0 where a few are not worth it."""
        window = self._credit + len(self._held)
        # Who waits for an interactive job must not wait for a window full of batch.
        most = window - window // _INTERACTIVE_SHARE
        room = most - sum(held == Priority.BATCH for held in self._held.values())
        return room if room >= min(_LEAST_BATCH, max(1, most // 4)) else 0

    async def open(self) -> None:
        """Enter the worker and its model."""
        now = time.time()
        await self._registry.add(
            WorkerRecord(
                worker_id=self.worker_id,
                model=self.model,
                info=self._hello.model.SerializeToString(),
                device=self._hello.device,
                version=self._hello.version,
                connected_at=now,
                seen_at=now,
                epoch=self._epoch,
            )
        )
        log.info("worker.connected", worker=self.worker_id, model=self.model)

    async def leave(self) -> None:
        """Forget the worker, and queue again what crossed its leaving."""
        self._credit = 0
        async with self._leasing:
            await self._queue.reconcile(self.worker_id, [])
        await self._registry.forget(self.worker_id, epoch=self._epoch)
        log.info("worker.left", worker=self.worker_id, model=self.model)

    async def lease(self) -> list[worker_pb2.WorkResponse]:
        """Lease queued jobs, as many as the worker has room for; empty: nothing to do."""
        async with self._leasing:
            return await self._lease()

    async def _lease(self) -> list[worker_pb2.WorkResponse]:
        # What it holds from before must be known first: it is told by the first heartbeat.
        if not self._credit or not self._reconciled:
            return []
        jobs = await self._queue.lease(
            self.model,
            self.worker_id,
            self._epoch,
            min(self._credit, _LEASES_AT_ONCE),
            self._batch_room(),
            (await self._models.get()).workers.get(self.model, 1),
        )
        self._credit -= len(jobs)
        if jobs:
            self._counts.leased.labels(self.model).inc(len(jobs))
        self._held |= {Lease(job.job_id, job.attempt): job.queue_class for job in jobs}
        return list(_lease_messages(jobs))

    async def check(self) -> list[worker_pb2.WorkResponse]:
        """Return what to tell the worker of leases that are not its own any more."""
        return self._revoked(await self._queue.lost(self.worker_id, list(self._held)))

    async def handle(self, request: worker_pb2.WorkRequest) -> list[worker_pb2.WorkResponse]:
        """Act on a message; return what to answer."""
        match request.WhichOneof("message"):
            case "ready":
                self._credit = min(self._credit + request.ready.jobs, _MOST_CREDIT)
                return []
            case "heartbeat":
                return await self._heartbeat(_leases(request.heartbeat.leases))
            case "results":
                return await self._store(request.results)
            case "release":
                await self._release(request.release)
                return []
            case other:
                raise InvalidRequestError(
                    Violation(other or "message", "is not allowed here: hello is sent once, first")
                )

    async def _heartbeat(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        await self._registry.seen(self.worker_id)
        if not self._reconciled:
            # Leases that went down with the last connection would cost their jobs a lease
            # time. Nothing is on its way to the worker yet, so it names all that it has.
            lost = await self._queue.reconcile(self.worker_id, leases)
            if lost:
                log.warning("leases.undelivered", worker=self.worker_id, jobs=lost)
            self._held = dict.fromkeys(leases, "")
            self._reconciled = True
        return self._revoked(await self._queue.renew(self.worker_id, leases))

    async def _release(self, release: worker_pb2.Release) -> None:
        leases = _leases(release.leases)
        if not release.HasField("error"):
            # Before the jobs are queued: they must not come back to the one that leaves.
            self._credit = 0
            await self._queue.release(self.worker_id, leases)
        else:
            exhausted = await self._queue.retry(self.worker_id, leases)
            await self._upkeep.end([endings.exhausted(x, release.error) for x in exhausted])
            self._counts.retried.labels(self.model).inc(len(leases))
            if exhausted:
                self._counts.ended.labels(self.model, "failed").inc(len(exhausted))
            log.warning(
                "attempts.failed",
                worker=self.worker_id,
                jobs=len(leases),
                final=len(exhausted),
                error=release.error.message,
            )
        self._drop(leases)

    def _drop(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._held.pop(lease, None)

    def _revoked(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        if not leases:
            return []
        self._drop(leases)
        refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]
        return [worker_pb2.WorkResponse(revoked=worker_pb2.Revoked(leases=refs))]

    async def _store(self, results: worker_pb2.Results) -> list[worker_pb2.WorkResponse]:
        chunks = [_new_chunk(index, chunk) for index, chunk in enumerate(results.chunks)]
        outcome = await self._queue.commit(self.worker_id, chunks)
        for index, code in enumerate(outcome):
            if code not in (LOST, STORED):
                raise InvalidRequestError(
                    Violation(
                        f"results.chunks[{index}].chunk.number",
                        f"{chunks[index].number} is out of order",
                    )
                )
        self._drop(chunk.lease for chunk in chunks if chunk.end)
        self._count(chunks, outcome)
        lost = {c.lease for c, code in zip(chunks, outcome, strict=True) if code == LOST}
        return [
            *self._revoked(sorted(lost, key=lambda lease: lease.job_id)),
            worker_pb2.WorkResponse(committed=worker_pb2.Committed(id=results.id)),
        ]

    def _count(self, chunks: list[NewChunk], outcome: list[int]) -> None:
        stored = [c for c, code in zip(chunks, outcome, strict=True) if code == STORED]
        self._counts.result_bytes.labels(self.model).inc(sum(len(c.data) for c in stored))
        for state, count in Counter(c.end for c in stored if c.end).items():
            self._counts.ended.labels(self.model, state.lower()).inc(count)


def _new_chunk(index: int, leased: worker_pb2.LeasedChunk) -> NewChunk:
    chunk = leased.chunk
    path = f"results.chunks[{index}].chunk"
    if not submission_of(chunk.job_id):
        raise InvalidRequestError(Violation(f"{path}.job_id", f"{chunk.job_id!r} is no job id"))
    if chunk.number < 1:
        raise InvalidRequestError(Violation(f"{path}.number", "counts from 1"))
    end = ""
    if chunk.HasField("end"):
        if chunk.end.state not in _END_STATES:
            raise InvalidRequestError(Violation(f"{path}.end.state", "must be SUCCEEDED or FAILED"))
        end = _END_STATES[chunk.end.state]
    return NewChunk(
        Lease(chunk.job_id, leased.attempt), chunk.number, end, chunk.SerializeToString()
    )


def _leases(refs: Any) -> list[Lease]:
    return [Lease(ref.job_id, ref.attempt) for ref in refs]


def _lease_messages(jobs: list[LeasedJob]) -> Iterator[worker_pb2.WorkResponse]:
    message, size = worker_pb2.Leases(), 0
    for job in jobs:
        if size and size + len(job.spec) > _LEASES_BYTES:
            yield worker_pb2.WorkResponse(leases=message)
            message, size = worker_pb2.Leases(), 0
        lease = message.leases.add(
            job_id=job.job_id,
            attempt=job.attempt,
            queued_for=_duration(job.queued_for),
            priority=(
                types_pb2.PRIORITY_BATCH
                if job.queue_class == Priority.BATCH
                else types_pb2.PRIORITY_INTERACTIVE
            ),
        )
        lease.spec.MergeFromString(job.spec)
        size += len(job.spec)
    if size:
        yield worker_pb2.WorkResponse(leases=message)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
