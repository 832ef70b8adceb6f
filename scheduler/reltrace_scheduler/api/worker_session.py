"""One worker's connection: every message is checked against its leases."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta

import structlog
from google.protobuf.duration_pb2 import Duration
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_scheduler.api import terminal_results
from reltrace_scheduler.api.leasing import EmptyQueueCache, Leasing
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.errors import InvalidRequestError, Violation
from reltrace_scheduler.keys import QueueName, submission_of
from reltrace_scheduler.limits import MAX_NEW_TOKENS
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.job_queue import LOST, STORED
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import (
    Lease,
    LeasedJob,
    ModelRecord,
    NewChunk,
    NewDraft,
    Priority,
    WorkerRecord,
)

log = structlog.get_logger()

_LEASES_BYTES = 16 << 20
_DRAFT_BYTES = 1 << 18
"""More than a whole text needs with any vocabulary."""
_MISSED = 2
"""Heartbeats that may be late before a worker is leased nothing: less than a lease."""

_END_STATES = {
    types_pb2.JOB_STATE_SUCCEEDED: "SUCCEEDED",
    types_pb2.JOB_STATE_FAILED: "FAILED",
}


class Session:
    """One connection of a worker, from its hello on."""

    def __init__(
        self,
        hello: worker_pb2.Hello,
        store: Store,
        models: ModelCache,
        empty: EmptyQueueCache,
        counts: Counts,
        spans: Spans,
    ) -> None:
        self.worker_id = hello.worker_id
        self._store = store
        self._queue = store.queue
        self._counts = counts
        self._spans = spans
        now = time.time()
        self._record = WorkerRecord(
            worker_id=self.worker_id,
            models=tuple(
                ModelRecord(model.name, model.revision, model.SerializeToString())
                for model in (hello.model, *hello.further_models)
            ),
            device=hello.device,
            version=hello.version,
            connected_at=now,
            seen_at=now,
            epoch=secrets.token_hex(8),
        )
        self.leasing = Leasing(
            store, models, empty, self.worker_id, self._record.epoch, self._record.routes
        )
        self._reconciled = False
        self._heard = time.monotonic()
        self._told_to_drain = False
        # A worker that leaves must not be leased jobs at the same moment.
        self._lock = asyncio.Lock()
        self._log = log.bind(worker=self.worker_id)

    async def open(self) -> None:
        """Enter the worker and its models."""
        await self._store.registry.add(self._record)
        self._log.info("worker.connected", models=[model.name for model in self._record.models])

    async def leave(self) -> None:
        """Forget the worker, and queue again what was leased while it left."""
        self.leasing.stop()
        async with self._lock:
            await self._queue.reconcile(self.worker_id, [])
        await self._store.registry.forget(self.worker_id, epoch=self._record.epoch)
        self._log.info("worker.left")

    async def lease(self) -> list[worker_pb2.WorkResponse]:
        """Lease queued jobs, as many as the worker has room for; empty: nothing to do."""
        async with self._lock:
            # The first heartbeat names the leases from before; they must be known first.
            ready = self._reconciled and not self._is_silent()
            jobs = await self.leasing.lease() if ready else []
        for route, count in Counter(job.queue.route for job in jobs).items():
            self._counts.leased.labels(route).inc(count)
        messages = list(_lease_messages(jobs))
        for lease in (lease for message in messages for lease in message.leases.leases):
            if lease.spec.traceparent:
                self._spans.record(
                    "reltrace.queued",
                    lease.spec.traceparent,
                    lease.queued_for.ToTimedelta().total_seconds(),
                    job=lease.job_id,
                    attempt=lease.attempt,
                    tenant=lease.tenant,
                    worker=self.worker_id,
                )
        return messages

    async def check(self) -> list[worker_pb2.WorkResponse]:
        """Return which leases are not the worker's any more, and whether it is to drain."""
        lost = await self._queue.lost(self.worker_id, self.leasing.leases)
        return [*self._revoke(lost), *await self._drain()]

    async def handle(self, request: worker_pb2.WorkRequest) -> list[worker_pb2.WorkResponse]:
        """Act on a message; return what to answer."""
        self._heard = time.monotonic()
        match request.WhichOneof("message"):
            case "ready":
                self.leasing.add_credit(request.ready.jobs)
            case "heartbeat":
                return await self._heartbeat(_leases(request.heartbeat.leases))
            case "results":
                return await self._commit(request.results)
            case "release":
                await self._release(request.release)
            case "drafts":
                drafts = [_new_draft(n, draft) for n, draft in enumerate(request.drafts.drafts)]
                await self._store.results.write_drafts(self.worker_id, drafts)
            case other:
                raise InvalidRequestError(
                    Violation(other or "message", "is not allowed here: hello is sent once, first")
                )
        return []

    def _is_silent(self) -> bool:
        """Tell whether heartbeats are missing, though the connection may look alive.

        What such a worker was leased would be lost again, and counted against the job.
        """
        return time.monotonic() - self._heard > _MISSED * self._store.settings.heartbeat

    async def _drain(self) -> list[worker_pb2.WorkResponse]:
        """Note that the worker is alive; return what to tell it if it is to drain."""
        draining = await self._store.registry.seen(self.worker_id, self._record.routes)
        if not draining or self._told_to_drain:
            return []
        self._told_to_drain = True
        self.leasing.stop()
        self._log.info("worker.drains")
        return [worker_pb2.WorkResponse(drain=worker_pb2.Drain())]

    async def _heartbeat(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        drain = await self._drain()
        if not self._reconciled:
            # Leases that were lost with the last connection would cost their jobs a lease time.
            # Nothing is on its way to the worker yet, so it names all that it has.
            lost = await self._queue.reconcile(self.worker_id, leases)
            if lost:
                self._log.warning("leases.undelivered", jobs=lost)
            self.leasing.restore(leases)
            self._reconciled = True
        return [*self._revoke(await self._queue.renew(self.worker_id, leases)), *drain]

    async def _release(self, release: worker_pb2.Release) -> None:
        leases = _leases(release.leases)
        if not release.HasField("error"):
            # First, so that the jobs do not come back to this worker.
            self.leasing.stop()
            await self._queue.release(self.worker_id, leases)
            self.leasing.drop(leases)
            return
        exhausted = await self._queue.retry(self.worker_id, leases)
        results = [terminal_results.failed(lease, release.error) for lease in exhausted]
        await terminal_results.end(self._store, self._counts, results)
        for lease, queue in zip(leases, self.leasing.drop(leases), strict=True):
            self._counts.retried.labels(queue.route).inc()
            self._log.warning(
                "attempt.failed",
                job=lease.job_id,
                tenant=queue.tenant,
                attempt=lease.attempt,
                final=lease in exhausted,
                error=release.error.message,
            )

    def _revoke(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        if not leases:
            return []
        self.leasing.drop(leases)
        refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]
        return [worker_pb2.WorkResponse(revoked=worker_pb2.Revoked(leases=refs))]

    async def _commit(self, results: worker_pb2.Results) -> list[worker_pb2.WorkResponse]:
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
        ended = self._count(chunks, outcome)
        if self._store.recent.enabled:
            await self._store.recent.note(
                [
                    terminal_results.recent_job(results.chunks[index].chunk, queue, self.worker_id)
                    for index, queue in ended.items()
                ]
            )
        lost = {c.lease for c, code in zip(chunks, outcome, strict=True) if code == LOST}
        return [
            *self._revoke(sorted(lost, key=lambda lease: lease.job_id)),
            worker_pb2.WorkResponse(committed=worker_pb2.Committed(id=results.id)),
        ]

    def _count(self, chunks: list[NewChunk], outcome: list[int]) -> dict[int, QueueName]:
        """Count what was stored, drop the leases that ended, and return their queues by chunk."""
        over: dict[int, QueueName] = {}
        sizes: Counter[str] = Counter()
        ended: Counter[tuple[str, str, str]] = Counter()
        for index, (chunk, code) in enumerate(zip(chunks, outcome, strict=True)):
            queue = self.leasing.queue_of(chunk.lease)
            if chunk.end:
                self.leasing.drop([chunk.lease])
            if code == STORED:
                sizes[queue.route] += len(chunk.data)
                if chunk.end:
                    ended[queue.route, queue.tenant, chunk.end.lower()] += 1
                    over[index] = queue
        for route, size in sizes.items():
            self._counts.result_bytes.labels(route).inc(size)
        for labels, count in ended.items():
            self._counts.ended.labels(*labels).inc(count)
        return over


def _new_chunk(index: int, leased: worker_pb2.LeasedChunk) -> NewChunk:
    chunk, path = leased.chunk, f"results.chunks[{index}].chunk"
    _check(bool(submission_of(chunk.job_id)), f"{path}.job_id", f"{chunk.job_id!r} is no job id")
    _check(chunk.number >= 1, f"{path}.number", "counts from 1")
    end = ""
    if chunk.HasField("end"):
        end = _END_STATES.get(chunk.end.state, "")
        _check(bool(end), f"{path}.end.state", "must be SUCCEEDED or FAILED")
    lease = Lease(chunk.job_id, leased.attempt)
    return NewChunk(lease, chunk.number, end, chunk.SerializeToString())


def _new_draft(index: int, draft: types_pb2.Draft) -> NewDraft:
    path, ids, size = f"drafts.drafts[{index}]", len(draft.token_ids), draft.ByteSize()
    _check(bool(submission_of(draft.job_id)), f"{path}.job_id", f"{draft.job_id!r} is no job id")
    _check(
        1 <= ids <= MAX_NEW_TOKENS - draft.first,
        f"{path}.token_ids",
        f"has {ids} from {draft.first} on; a draft has at least one, and a text at most "
        f"{MAX_NEW_TOKENS}",
    )
    _check(
        len(draft.tokens) == ids, f"{path}.tokens", f"has {len(draft.tokens)} tokens for {ids} ids"
    )
    _check(size <= _DRAFT_BYTES, path, f"is {size} bytes long; at most {_DRAFT_BYTES} are allowed")
    return NewDraft(Lease(draft.job_id, draft.attempt), draft.SerializeToString())


def _check(valid: bool, field: str, problem: str) -> None:
    if not valid:
        raise InvalidRequestError(Violation(field, problem))


def _leases(refs: Iterable[worker_pb2.LeaseRef]) -> list[Lease]:
    return [Lease(ref.job_id, ref.attempt) for ref in refs]


def _lease_messages(jobs: list[LeasedJob]) -> Iterator[worker_pb2.WorkResponse]:
    message, size = worker_pb2.Leases(), 0
    for job in jobs:
        if size and size + len(job.spec) > _LEASES_BYTES:
            yield worker_pb2.WorkResponse(leases=message)
            message, size = worker_pb2.Leases(), 0
        batch = job.queue.queue_class == Priority.BATCH
        lease = message.leases.add(
            job_id=job.job_id,
            attempt=job.attempt,
            queued_for=duration(job.queued_for),
            priority=types_pb2.PRIORITY_BATCH if batch else types_pb2.PRIORITY_INTERACTIVE,
            tenant=job.queue.tenant,
        )
        lease.spec.MergeFromString(job.spec)
        size += len(job.spec)
    if size:
        yield worker_pb2.WorkResponse(leases=message)


def duration(seconds: float) -> Duration:
    wire = Duration()
    wire.FromTimedelta(timedelta(seconds=seconds))
    return wire
