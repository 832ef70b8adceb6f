"""WorkerService: one stream per worker, for as long as it lives."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from reltrace_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import InvalidRequestError, Violation
from reltrace_scheduler.store.keys import REAPER, Keys, submission_of
from reltrace_scheduler.store.queue import LOST, STORED, Queue
from reltrace_scheduler.store.records import Lease, NewChunk, WorkerRecord
from reltrace_scheduler.store.registry import Registry
from reltrace_scheduler.store.signals import Signals, wait
from reltrace_scheduler.tasks import end

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

_HELLO_DEADLINE = 10.0
_LOOK_AGAIN = 1.0
"""Seconds between looks at the queue while no signal comes."""
_LEASES_AT_ONCE = 256
_MOST_CREDIT = 4096

_END_STATES = {
    types_pb2.JOB_STATE_SUCCEEDED: "SUCCEEDED",
    types_pb2.JOB_STATE_FAILED: "FAILED",
}


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Leases jobs to workers and stores what they send back."""

    def __init__(
        self, queue: Queue, registry: Registry, signals: Signals, settings: Settings, keys: Keys
    ) -> None:
        self._queue = queue
        self._registry = registry
        self._signals = signals
        self._settings = settings
        self._keys = keys

    async def Work(  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.WorkRequest], context: Context
    ) -> AsyncIterator[worker_pb2.WorkResponse]:
        requests = aiter(request_iterator)
        hello = await _first(requests)
        session = Session(hello, self._queue, self._registry, self._settings)
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

        async def receive() -> None:
            async for request in requests:
                for response in await session.handle(request):
                    await outgoing.put(response)
            # The worker closed its side in order: it holds nothing any more.
            await session.close()
            await outgoing.put(None)

        async def dispatch() -> None:
            with self._signals.listen(self._keys.wake(session.model)) as signal:
                while True:
                    leases = await session.lease()
                    if leases is not None:
                        await outgoing.put(worker_pb2.WorkResponse(leases=leases))
                    elif session.credit:
                        await wait(signal, _LOOK_AGAIN)
                    else:
                        await wait(session.more_credit, _LOOK_AGAIN)

        tasks = [asyncio.create_task(receive()), asyncio.create_task(dispatch())]
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
        self, hello: worker_pb2.Hello, queue: Queue, registry: Registry, settings: Settings
    ) -> None:
        self.worker_id = hello.worker_id
        self.model = hello.model.name
        self.credit = 0
        self.more_credit = asyncio.Event()
        self._hello = hello
        self._queue = queue
        self._registry = registry
        self._settings = settings

    async def open(self) -> None:
        """Enter the worker and its model."""
        now = time.time()
        await self._queue.create(self.model)
        await self._registry.add(
            WorkerRecord(
                worker_id=self.worker_id,
                model=self.model,
                info=self._hello.model.SerializeToString(),
                device=self._hello.device,
                version=self._hello.version,
                connected_at=now,
                seen_at=now,
            )
        )
        log.info("worker.connected", worker=self.worker_id, model=self.model)

    async def close(self) -> None:
        """Forget the worker: it left in order."""
        await self._registry.forget(self.worker_id, self.model, unseen_since=None)
        log.info("worker.left", worker=self.worker_id, model=self.model)

    async def lease(self) -> worker_pb2.Leases | None:
        """Lease queued jobs, as many as the worker has room for; None: nothing to do."""
        if not self.credit:
            return None
        jobs = await self._queue.lease(
            self.model, self.worker_id, min(self.credit, _LEASES_AT_ONCE)
        )
        if not jobs:
            return None
        self.credit -= len(jobs)
        leases = worker_pb2.Leases()
        for job in jobs:
            lease = leases.leases.add(job_id=job.job_id, attempt=job.attempt)
            lease.spec.MergeFromString(job.spec)
            lease.queued_for.FromTimedelta(timedelta(seconds=max(time.time() - job.queued_at, 0)))
        return leases

    async def handle(self, request: worker_pb2.WorkRequest) -> list[worker_pb2.WorkResponse]:
        """Act on a message; return what to answer."""
        match request.WhichOneof("message"):
            case "ready":
                self.credit = min(self.credit + request.ready.jobs, _MOST_CREDIT)
                self.more_credit.set()
                return []
            case "heartbeat":
                await self._registry.seen(self.worker_id)
                return _revoked(
                    await self._queue.renew(
                        self.model, self.worker_id, _leases(request.heartbeat.leases)
                    )
                )
            case "results":
                return await self._store(request.results)
            case "release":
                await self._queue.requeue(
                    self.model, self.worker_id, _leases(request.release.leases)
                )
                return []
            case other:
                raise InvalidRequestError(
                    Violation(other or "message", "is not allowed here: hello is sent once, first")
                )

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
        lost = {c.lease for c, code in zip(chunks, outcome, strict=True) if code == LOST}
        return [
            *_revoked(sorted(lost, key=lambda lease: lease.job_id)),
            worker_pb2.WorkResponse(committed=worker_pb2.Committed(id=results.id)),
        ]


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


def _revoked(leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
    if not leases:
        return []
    refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]
    return [worker_pb2.WorkResponse(revoked=worker_pb2.Revoked(leases=refs))]


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
