"""One worker's connection: every message is checked against its leases."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta

import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2
from redis.exceptions import RedisError
from reltrace_proto.protocol import PROTOCOL
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_scheduler.api import terminal_results
from reltrace_scheduler.api.leasing import UNKNOWN, EmptyQueueCache, Leasing
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.api.result_store import may_hold_results
from reltrace_scheduler.errors import invalid
from reltrace_scheduler.keys import QueueName, submission_of
from reltrace_scheduler.limits import MAX_NEW_TOKENS
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.job_queue import LOST, OUT_OF_ORDER, TOO_LARGE
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.queue.trouble import FULL, log_trouble, trouble_of
from reltrace_scheduler.records import Lease, NewChunk, Priority, WorkerRecord

log = structlog.get_logger()

_DRAFT_BYTES = 1 << 18
"""More than a whole text needs with any vocabulary."""
_FIRST_DELAY, _LAST_DELAY = 1.0, 8.0
"""Seconds after which a worker sends results again that Redis had no room for."""
_SHOWN_URL = 200
_MISSED = 2
"""Heartbeats that a worker may miss before it is leased nothing: shorter than a lease."""
_SHOWN_SILENCE = 5.0
_STALLED = 2
"""Times the limit that a worker tells, after which its leases are renewed no more."""

_END_STATES = (types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_FAILED)


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
        self._models: dict[str, bytes] = {}
        for model in (hello.model, *hello.further_models):
            self._models[model.name] = info = model.SerializeToString()
            if model.revision:
                self._models[f"{model.name}@{model.revision}"] = info
        self._record = WorkerRecord(
            worker_id=self.worker_id,
            hello=hello.SerializeToString(),
            routes=tuple(self._models),
            epoch=secrets.token_hex(8),
        )
        self.leasing = Leasing(store, models, empty, self._record)
        self._reconciled = False
        self._last_message = time.monotonic()
        self._told_to_drain = False
        # Seconds for which its pass has made no progress, and whether that is past all bounds.
        self._silent = 0.0
        self._stalled = False
        # The first results that Redis had no room for, and how often it had none in a row.
        self._takes_deferred = hello.protocol > 0
        self._deferred: int | None = None
        self._deferrals = 0
        # A worker that leaves must not be leased jobs at the same moment.
        self._lock = asyncio.Lock()
        self._log = log.bind(worker=self.worker_id)

    async def open(self) -> worker_pb2.WorkResponse:
        """Enter the worker and its models; return the welcome."""
        await self._store.registry.add(self._record, self._models)
        self._log.info("worker.connected", models=list(self._models))
        settings = self._store.settings
        welcome = worker_pb2.Welcome(
            lease=_duration(settings.lease),
            heartbeat=_duration(settings.heartbeat),
            results_url=self._store.results_url,
            results_above_bytes=self._store.bounds.results_above,
            max_result_bytes=self._store.bounds.max_result_bytes,
            drafts=True,
            output_uri=settings.output_uri,
            protocol=PROTOCOL,
        )
        return worker_pb2.WorkResponse(welcome=welcome)

    async def leave(self) -> None:
        """Forget the worker, and queue again what was leased while it left."""
        self.leasing.stop()
        async with self._lock:
            await self._queue.reconcile(self.worker_id, [])
        await self._store.registry.forget(self.worker_id, epoch=self._record.epoch)
        self._log.info("worker.left")

    async def lease(self) -> worker_pb2.WorkResponse | None:
        """Lease queued jobs, as many as the worker has room for; None: nothing to do."""
        async with self._lock:
            # Only after the first heartbeat, which names the leases from before this connection.
            ready = self._reconciled and not self._stalled and not self._misses_heartbeats()
            jobs = await self.leasing.lease() if ready else ()
        if not jobs:
            return None
        self._counts.leased.labels(jobs[0].queue.route).inc(len(jobs))
        leases = worker_pb2.Leases()
        for job in jobs:
            batch = job.queue.queue_class == Priority.BATCH
            lease = leases.leases.add(
                job_id=job.job_id,
                attempt=job.attempt,
                priority=types_pb2.PRIORITY_BATCH if batch else types_pb2.PRIORITY_INTERACTIVE,
                tenant=job.queue.tenant,
            )
            lease.queued_for.FromMilliseconds(round(1000 * job.queued_for))
            lease.spec.MergeFromString(job.spec)
            if lease.spec.traceparent:
                self._spans.record(
                    "reltrace.queued",
                    lease.spec.traceparent,
                    job.queued_for,
                    job=job.job_id,
                    attempt=job.attempt,
                    tenant=job.queue.tenant,
                    worker=self.worker_id,
                )
        return worker_pb2.WorkResponse(leases=leases)

    async def check(self) -> list[worker_pb2.WorkResponse]:
        """Return which leases are not the worker's any more, and whether it is to drain."""
        lost = await self._queue.renew(self.worker_id, list(self.leasing.held), check_only=True)
        return [*self._revoke(lost), *await self._drain()]

    async def handle(self, request: worker_pb2.WorkRequest) -> list[worker_pb2.WorkResponse]:
        self._last_message = time.monotonic()
        match request.WhichOneof("message"):
            case "ready":
                self.leasing.add_credit(request.ready.jobs)
            case "heartbeat":
                return await self._heartbeat(request.heartbeat)
            case "results":
                return await self._commit_or_defer(request.results)
            case "release":
                await self._release(request.release)
            case "drafts":
                drafts = [_new_draft(n, draft) for n, draft in enumerate(request.drafts.drafts)]
                await self._write_drafts(drafts)
            case other:
                raise invalid(other or "message", "is not allowed here: hello is sent once, first")
        return []

    def _misses_heartbeats(self) -> bool:
        """Tell whether heartbeats are missing, even if the connection looks alive.

        The leases of such a worker would be lost, which counts against their jobs.
        """
        return time.monotonic() - self._last_message > _MISSED * self._store.settings.heartbeat

    async def _drain(self) -> list[worker_pb2.WorkResponse]:
        """Note that the worker is alive; return what to tell it if it is to drain."""
        draining = await self._store.registry.seen(
            self.worker_id, self._record.routes, self._silent
        )
        if not draining or self._told_to_drain:
            return []
        self._told_to_drain = True
        self.leasing.stop()
        self._log.info("worker.drains")
        return [worker_pb2.WorkResponse(drain=worker_pb2.Drain())]

    async def _heartbeat(self, beat: worker_pb2.Heartbeat) -> list[worker_pb2.WorkResponse]:
        leases = _leases(beat.leases)
        self._note_progress(beat.progress)
        drain = await self._drain()
        if not self._reconciled:
            # Leases that were lost with the last connection would cost their jobs a lease time.
            # Nothing is on its way to the worker yet, so it names all that it has.
            lost = await self._queue.reconcile(self.worker_id, leases)
            if lost:
                self._log.warning("leases.undelivered", jobs=lost)
            self.leasing.held = dict.fromkeys(leases, UNKNOWN)
            self._reconciled = True
        revoked = await self._queue.renew(self.worker_id, leases, check_only=self._stalled)
        return [*self._revoke(revoked), *drain]

    def _note_progress(self, progress: worker_pb2.Progress) -> None:
        silent, limit = _seconds(progress.silent), _seconds(progress.limit)
        self._silent = silent if silent >= _SHOWN_SILENCE else 0.0
        # The worker should have ended by itself.
        stalled = silent > _STALLED * limit > 0
        if stalled and not self._stalled:
            self._log.error("worker.stalled", silent=round(silent), limit=round(limit))
        self._stalled = stalled

    async def _release(self, release: worker_pb2.Release) -> None:
        leases = _leases(release.leases)
        if release.HasField("error"):
            await self._fail_attempts(leases, release.error)
            return
        # First, so that the jobs do not come back to this worker.
        self.leasing.stop()
        await self._queue.release(self.worker_id, leases)
        self.leasing.drop(leases)

    async def _fail_attempts(self, leases: Iterable[Lease], error: types_pb2.JobError) -> None:
        """Let attempts that this worker holds fail for a reason that may pass."""
        leases = [lease for lease in leases if lease in self.leasing.held]
        exhausted = await self._queue.retry(self.worker_id, leases)
        results = [terminal_results.failed(lease, error) for lease in exhausted]
        await terminal_results.end(self._store, self._counts, results)
        for lease, queue in zip(leases, self.leasing.drop(leases), strict=True):
            # Why is in the worker's log: its message may quote the job.
            self._counts.retried.labels(queue.route).inc()
            self._log.warning(
                "attempt.failed",
                job=lease.job_id,
                tenant=queue.tenant,
                attempt=lease.attempt,
                final=lease in exhausted,
            )

    async def _retry_torn(self, chunks: Sequence[NewChunk], outcome: Sequence[int]) -> None:
        """Let attempts fail whose chunks do not follow those that are stored.

        The store may have lost what it had confirmed last, as a replica that takes over has.
        """
        torn: dict[Lease, int] = {}
        for chunk, code in zip(chunks, outcome, strict=True):
            if code == OUT_OF_ORDER:
                torn.setdefault(chunk.lease, chunk.number)
        for lease, number in torn.items():
            message = f"chunk {number} of the result came without those before it"
            error = types_pb2.JobError(code=code_pb2.INTERNAL, message=message)
            await self._fail_attempts([lease], error)

    def _revoke(self, leases: list[Lease]) -> list[worker_pb2.WorkResponse]:
        if not leases:
            return []
        self.leasing.drop(leases)
        refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]
        return [worker_pb2.WorkResponse(revoked=worker_pb2.Revoked(leases=refs))]

    async def _write_drafts(self, drafts: list[tuple[Lease, bytes]]) -> None:
        try:
            await self._store.results.write_drafts(self.worker_id, drafts)
        except RedisError as error:
            # Readers get the whole text with the result.
            if trouble_of(error) != FULL:
                raise

    async def _commit_or_defer(self, results: worker_pb2.Results) -> list[worker_pb2.WorkResponse]:
        # What follows deferred results waits with them: chunks of a job come in order.
        if self._deferred is None or results.id == self._deferred:
            try:
                responses = await self._commit(results)
            except RedisError as error:
                if trouble_of(error) != FULL or not self._takes_deferred:
                    raise
                log_trouble("results.deferred", error, worker=self.worker_id)
                self._deferred = results.id
                self._deferrals += 1
            else:
                self._deferred, self._deferrals = None, 0
                return responses
        delay = min(_FIRST_DELAY * 2 ** (self._deferrals - 1), _LAST_DELAY)
        deferred = worker_pb2.Deferred(id=results.id, delay=_duration(delay))
        return [worker_pb2.WorkResponse(deferred=deferred)]

    async def _refuse_other_stores(self, results: worker_pb2.Results) -> None:
        """Take out chunks whose tensors are in no store of ours: their attempts have failed.

        Clients open what a result names.
        """
        refused = [chunk for chunk in results.chunks if not self._is_in_a_store_of_ours(chunk)]
        for leased in refused:
            results.chunks.remove(leased)
            url = leased.chunk.manifest.url[:_SHOWN_URL]
            self._log.error("store.not_ours", job=leased.chunk.job_id, url=url)
            message = f"the tensors were written to {url!r}, which is no store of this service"
            error = types_pb2.JobError(code=code_pb2.INTERNAL, message=message)
            await self._fail_attempts([_lease(leased)], error)

    def _is_in_a_store_of_ours(self, leased: worker_pb2.LeasedChunk) -> bool:
        if not leased.chunk.HasField("manifest"):
            return True
        tenant = self.leasing.held.get(_lease(leased), UNKNOWN).tenant
        url, patterns = leased.chunk.manifest.url, self._store.settings.output_uri
        return may_hold_results(url, self._store.results_url, patterns, tenant)

    async def _commit(self, results: worker_pb2.Results) -> list[worker_pb2.WorkResponse]:
        await self._refuse_other_stores(results)
        most = self._store.bounds.max_result_bytes
        chunks = [_new_chunk(index, chunk, most) for index, chunk in enumerate(results.chunks)]
        outcome = await self._queue.commit(self.worker_id, chunks)
        await self._retry_torn(chunks, outcome)
        lost: set[Lease] = set()
        sizes: Counter[str] = Counter()
        ended: list[tuple[types_pb2.ResultChunk, QueueName]] = []
        for new, leased, code in zip(chunks, results.chunks, outcome, strict=True):
            queue = self.leasing.held.get(new.lease, UNKNOWN)
            if new.end:
                self.leasing.drop([new.lease])
            if code in (LOST, OUT_OF_ORDER):
                lost.add(new.lease)
                continue
            if code == TOO_LARGE:
                # The worker is told to drop it: there is nothing to send any more.
                lost.add(new.lease)
                self._log.warning("result.too_large", job=new.lease.job_id, tenant=queue.tenant)
                ended.append((types_pb2.ResultChunk.FromString(new.too_large), queue))
                continue
            sizes[queue.route] += len(new.data)
            self._store.results.note_stored(self.worker_id, new)
            if new.end:
                ended.append((leased.chunk, queue))
        for route, size in sizes.items():
            self._counts.result_bytes.labels(route).inc(size)
        await terminal_results.note_ended(self._store, self._counts, ended, self.worker_id)
        return [
            *self._revoke(sorted(lost, key=lambda lease: lease.job_id)),
            worker_pb2.WorkResponse(committed=worker_pb2.Committed(id=results.id)),
        ]


def _new_chunk(index: int, leased: worker_pb2.LeasedChunk, max_result_bytes: int) -> NewChunk:
    chunk, path = leased.chunk, f"results.chunks[{index}].chunk"
    if not submission_of(chunk.job_id):
        raise invalid(f"{path}.job_id", f"{chunk.job_id!r} is no job id")
    if chunk.number < 1:
        raise invalid(f"{path}.number", "counts from 1")
    end = ""
    if chunk.HasField("end"):
        if chunk.end.state not in _END_STATES:
            raise invalid(f"{path}.end.state", "must be SUCCEEDED or FAILED")
        end = terminal_results.state_name(chunk.end.state)
    new = NewChunk(_lease(leased), chunk.number, end, chunk.SerializeToString())
    if new.is_inline:
        return new
    return replace(new, too_large=terminal_results.too_large(new.lease, max_result_bytes).data)


def _new_draft(index: int, draft: types_pb2.Draft) -> tuple[Lease, bytes]:
    path, ids = f"drafts.drafts[{index}]", len(draft.token_ids)
    if not submission_of(draft.job_id):
        raise invalid(f"{path}.job_id", f"{draft.job_id!r} is no job id")
    if not 1 <= ids <= MAX_NEW_TOKENS - draft.first:
        problem = f"must be 1 at least, and with those before {MAX_NEW_TOKENS} at most"
        raise invalid(f"{path}.token_ids", problem)
    if len(draft.tokens) != ids:
        raise invalid(f"{path}.tokens", f"must be as many as the {ids} token_ids")
    if draft.ByteSize() > _DRAFT_BYTES:
        raise invalid(path, f"must be at most {_DRAFT_BYTES} bytes long")
    return Lease(draft.job_id, draft.attempt), draft.SerializeToString()


def _lease(leased: worker_pb2.LeasedChunk) -> Lease:
    return Lease(leased.chunk.job_id, leased.attempt)


def _leases(refs: Iterable[worker_pb2.LeaseRef]) -> list[Lease]:
    return [Lease(ref.job_id, ref.attempt) for ref in refs]


def _seconds(wire: Duration) -> float:
    # Not by a timedelta, which holds less.
    return wire.seconds + wire.nanos / 1e9


def _duration(seconds: float) -> Duration:
    wire = Duration()
    wire.FromTimedelta(timedelta(seconds=seconds))
    return wire
