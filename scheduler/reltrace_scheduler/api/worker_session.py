"""What one worker's stream may do: everything is checked against its leases."""

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

from reltrace_scheduler.api import terminal_results as endings
from reltrace_scheduler.api.idle_queues import Idleness
from reltrace_scheduler.api.leasing import Held, Leasing
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.errors import InvalidRequestError, Violation
from reltrace_scheduler.keys import submission_of
from reltrace_scheduler.limits import MAX_NEW_TOKENS
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.queue import LOST, STORED
from reltrace_scheduler.queue.recent import RecentJob
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
"""More than any vocabulary needs for a whole text."""
_MISSED = 2
"""Heartbeats that may be late before a worker is leased nothing: less than a lease."""
_SHOWN_TOKENS, _SHOWN_TEXT = 40, 120

_END_STATES = {
    types_pb2.JOB_STATE_SUCCEEDED: "SUCCEEDED",
    types_pb2.JOB_STATE_FAILED: "FAILED",
}


class Session:
    """One connection of a worker, from its greeting on."""

    def __init__(
        self,
        hello: worker_pb2.Hello,
        store: Store,
        models: ModelCache,
        idleness: Idleness,
        counts: Counts,
        spans: Spans,
    ) -> None:
        self._spans = spans
        self.worker_id = hello.worker_id
        self._hello = hello
        self._store = store
        self._counts = counts
        self._epoch = secrets.token_hex(8)
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
            epoch=self._epoch,
        )
        self.leasing = Leasing(
            store, models, idleness, self.worker_id, self._epoch, self._record.routes
        )
        self._reconciled = False
        self._heard = time.monotonic()
        self._told_to_drain = False
        # Whoever leaves must not be leased to at the same moment.
        self._lock = asyncio.Lock()
        self._log = log.bind(worker=self.worker_id)

    async def open(self) -> None:
        """Enter the worker and its models."""
        await self._store.registry.add(self._record)
        self._log.info("worker.connected", models=[model.name for model in self._record.models])

    async def leave(self) -> None:
        """Forget the worker, and queue again what crossed its leaving."""
        self.leasing.closed()
        async with self._lock:
            await self._store.reconcile(self.worker_id, [])
        await self._store.registry.forget(self.worker_id, epoch=self._epoch)
        self._log.info("worker.left")

    async def lease(self) -> list[worker_pb2.WorkResponse]:
        """Lease queued jobs, as many as the worker has room for; empty: nothing to do."""
        async with self._lock:
            # What it holds from before must be known first: it is told by the first heartbeat.
            ready = self._reconciled and not self._silent()
            jobs = await self.leasing.lease() if ready else []
        for route, count in Counter(job.route for job in jobs).items():
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
        """Return what to tell the worker: of leases that are not its own any more, or to leave."""
        lost = await self._store.lost(self.worker_id, self.leasing.leases)
        return [*self._revoked(lost), *await self._drain()]

    async def handle(self, request: worker_pb2.WorkRequest) -> list[worker_pb2.WorkResponse]:
        """Act on a message; return what to answer."""
        self._heard = time.monotonic()
        match request.WhichOneof("message"):
            case "ready":
                self.leasing.offered(request.ready.jobs)
                return []
            case "heartbeat":
                return await self._heartbeat(_leases(request.heartbeat.leases))
            case "results":
                return await self._commit(request.results)
            case "release":
                await self._release(request.release)
                return []
            case "drafts":
                drafts = [_new_draft(n, draft) for n, draft in enumerate(request.drafts.drafts)]
                await self._store.draft(self.worker_id, drafts)
                return []
            case other:
                raise InvalidRequestError(
                    Violation(other or "message", "is not allowed here: hello is sent once, first")
                )

    def _silent(self) -> bool:
        """Tell whether heartbeats stay away: of a line that is cut, nobody is told.

        What such a worker was leased would be lost again, and counted against the job.
        """
        return time.monotonic() - self._heard > _MISSED * self._store.settings.heartbeat

    async def _drain(self) -> list[worker_pb2.WorkResponse]:
        """Note that the worker is alive; return what to tell it if it is to leave."""
        wanted = await self._store.registry.seen(self.worker_id, self._record.routes)
        if not wanted or self._told_to_drain:
            return []
        self._told_to_drain = True
        self.leasing.closed()
        self._log.info("worker.drains")
        return [worker_pb2.WorkResponse(drain=worker_pb2.Drain())]

    async def _heartbeat(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        drain = await self._drain()
        if not self._reconciled:
            # Leases that went down with the last connection would cost their jobs a lease
            # time. Nothing is on its way to the worker yet, so it names all that it has.
            lost = await self._store.reconcile(self.worker_id, leases)
            if lost:
                self._log.warning("leases.undelivered", jobs=lost)
            self.leasing.known(leases)
            self._reconciled = True
        return [*self._revoked(await self._store.renew(self.worker_id, leases)), *drain]

    async def _release(self, release: worker_pb2.Release) -> None:
        leases = _leases(release.leases)
        if not release.HasField("error"):
            # Before the jobs are queued: they must not come back to the one that leaves.
            self.leasing.closed()
            await self._store.release(self.worker_id, leases)
            self.leasing.drop(leases)
            return
        exhausted = await self._store.retry(self.worker_id, leases)
        over = [endings.exhausted(lease, release.error) for lease in exhausted]
        await endings.end(self._store, self._counts, over)
        for lease, held in zip(leases, self.leasing.drop(leases), strict=True):
            self._counts.retried.labels(held.route).inc()
            self._log.warning(
                "attempt.failed",
                job=lease.job_id,
                tenant=held.tenant,
                attempt=lease.attempt,
                final=lease in exhausted,
                error=release.error.message,
            )

    def _revoked(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        if not leases:
            return []
        self.leasing.drop(leases)
        refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]
        return [worker_pb2.WorkResponse(revoked=worker_pb2.Revoked(leases=refs))]

    async def _commit(self, results: worker_pb2.Results) -> list[worker_pb2.WorkResponse]:
        chunks = [_new_chunk(index, chunk) for index, chunk in enumerate(results.chunks)]
        outcome = await self._store.commit(self.worker_id, chunks)
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
            await self._note(results, ended)
        lost = {c.lease for c, code in zip(chunks, outcome, strict=True) if code == LOST}
        return [
            *self._revoked(sorted(lost, key=lambda lease: lease.job_id)),
            worker_pb2.WorkResponse(committed=worker_pb2.Committed(id=results.id)),
        ]

    async def _note(self, results: worker_pb2.Results, ended: dict[int, Held]) -> None:
        """Keep some of what ended for people to look at."""
        jobs = []
        for index, held in ended.items():
            chunk = results.chunks[index].chunk
            good = chunk.end.state == types_pb2.JOB_STATE_SUCCEEDED
            whole = good and chunk.number == 1 and bool(chunk.tensors)
            jobs.append(
                RecentJob(
                    job=chunk.job_id,
                    tenant=held.tenant,
                    model=held.route,
                    worker=self.worker_id,
                    state=_END_STATES[chunk.end.state],
                    at=time.time(),
                    text="".join(chunk.header.tokens[:_SHOWN_TOKENS])[:_SHOWN_TEXT],
                    error=chunk.end.error.message,
                    picture=chunk.SerializeToString() if whole else b"",
                )
            )
        await self._store.recent.note(jobs)

    def _count(self, chunks: list[NewChunk], outcome: list[int]) -> dict[int, Held]:
        """Count what was stored, forget the leases that ended with it, and return these."""
        over: dict[int, Held] = {}
        sizes: Counter[str] = Counter()
        ended: Counter[tuple[str, str, str]] = Counter()
        for index, (chunk, code) in enumerate(zip(chunks, outcome, strict=True)):
            held = (
                self.leasing.drop([chunk.lease])[0] if chunk.end else self.leasing.held(chunk.lease)
            )
            if code == STORED:
                sizes[held.route] += len(chunk.data)
                if chunk.end:
                    ended[held.route, held.tenant, chunk.end.lower()] += 1
                    over[index] = held
        for route, size in sizes.items():
            self._counts.result_bytes.labels(route).inc(size)
        for labels, count in ended.items():
            self._counts.ended.labels(*labels).inc(count)
        return over


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


def _new_draft(index: int, draft: types_pb2.Draft) -> NewDraft:
    path = f"drafts.drafts[{index}]"
    if not submission_of(draft.job_id):
        raise InvalidRequestError(Violation(f"{path}.job_id", f"{draft.job_id!r} is no job id"))
    if not 1 <= len(draft.token_ids) <= MAX_NEW_TOKENS - draft.first:
        raise InvalidRequestError(
            Violation(
                f"{path}.token_ids",
                f"are {len(draft.token_ids)} from {draft.first} on; "
                f"a draft has one at least, and a text {MAX_NEW_TOKENS} at most",
            )
        )
    if len(draft.tokens) != len(draft.token_ids):
        raise InvalidRequestError(
            Violation(f"{path}.tokens", f"are {len(draft.tokens)} of {len(draft.token_ids)} ids")
        )
    if (size := draft.ByteSize()) > _DRAFT_BYTES:
        raise InvalidRequestError(
            Violation(path, f"is {size} bytes long; at most {_DRAFT_BYTES} are allowed")
        )
    return NewDraft(Lease(draft.job_id, draft.attempt), draft.SerializeToString())


def _leases(refs: Iterable[worker_pb2.LeaseRef]) -> list[Lease]:
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
            queued_for=duration(job.queued_for),
            priority=(
                types_pb2.PRIORITY_BATCH
                if job.queue_class == Priority.BATCH
                else types_pb2.PRIORITY_INTERACTIVE
            ),
            tenant=job.tenant,
        )
        lease.spec.MergeFromString(job.spec)
        size += len(job.spec)
    if size:
        yield worker_pb2.WorkResponse(leases=message)


def duration(seconds: float) -> Duration:
    """Return seconds as they travel."""
    wire = Duration()
    wire.FromTimedelta(timedelta(seconds=seconds))
    return wire
