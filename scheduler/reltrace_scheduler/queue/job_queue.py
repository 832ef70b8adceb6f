"""Jobs between clients and workers: every transition is one Lua script."""

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from redis.exceptions import TimeoutError as RedisTimeoutError

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import (
    ForbiddenError,
    IdempotencyError,
    QueueFullError,
    SchedulerError,
    StoreFullError,
    SupersededError,
    TooLargeError,
)
from reltrace_scheduler.keys import QueueName, submission_id, submission_of
from reltrace_scheduler.queue.bounds import Bounds
from reltrace_scheduler.queue.shards import Shard, Shards, milliseconds
from reltrace_scheduler.records import (
    JobRecord,
    Lease,
    Leased,
    LeasedJob,
    NewChunk,
    NewJob,
    Priority,
    Submission,
    TerminalResult,
)
from reltrace_scheduler.tasks import off_loop

LOST, STORED, OUT_OF_ORDER, TOO_LARGE = 0, 1, -1, 2
"""Outcomes of `JobQueue.commit` per chunk."""

_IDEMPOTENCY_TTL = 24 * 3600.0


class JobQueue:
    """The state machine of jobs.

    ``QUEUED -> LEASED -> SUCCEEDED | FAILED``, from LEASED back to QUEUED when a lease is
    released, and from both to ``FAILED | CANCELLED | QUARANTINED`` by `end`. Transitions that
    time brings about are in `Maintenance`.
    """

    def __init__(self, shards: Shards, settings: Settings, bounds: Bounds) -> None:
        self._shards = shards
        self._redis = shards.redis
        self._settings = settings
        self._bounds = bounds

    async def submit(
        self,
        jobs: Sequence[NewJob],
        *,
        tenant: str,
        priority: Priority = Priority.INTERACTIVE,
        idempotency_key: str = "",
    ) -> Submission:
        """Accept jobs, all or none; they are stored when this returns.

        Raises
        ------
        QueueFullError, StoreFullError
            The bounds on jobs or bytes would be passed, or Redis' memory; nothing was accepted.
        TooLargeError
            They would be passed even if the queue were empty.
        ForbiddenError
            The bound on jobs is 0.
        IdempotencyError
            The key was used for other jobs.
        NotReplicatedError
            The jobs were accepted, but a failover may lose them.
        """
        settings, bounds = self._settings, self._bounds
        shard = self._shards.for_submission(tenant, idempotency_key)
        submission = submission_id(secrets.token_hex(10), shard.key.shard)
        jobs_digest = "-"
        if idempotency_key:
            jobs_digest = await off_loop(
                lambda: digest((job.sent or job.spec for job in jobs), priority)
            )
        if await bounds.are_reached(len(jobs), sum(len(job.spec) for job in jobs)):
            earlier = idempotency_key and await self.seen(tenant, idempotency_key, jobs_digest)
            if not earlier:
                raise StoreFullError
            return earlier
        status, *details = await shard.run(
            "submit",
            [
                shard.key("idempotency", tenant, idempotency_key),
                shard.key("submission", submission),
                shard.key("tenant", tenant),
            ],
            submission,
            tenant,
            priority,
            milliseconds(_IDEMPOTENCY_TTL) if idempotency_key else 0,
            jobs_digest,
            settings.max_jobs,
            bounds.max_bytes,
            settings.tenant_max_jobs,
            bounds.tenant_max_bytes,
            settings.shards,
            *(part for job in jobs for part in _parts(job, bounds.max_result_bytes)),
            replicated=True,
        )
        if status == b"seen":
            return Submission(details[0].decode(), int(details[1]), deduplicated=True)
        if status == b"differs":
            raise IdempotencyError(idempotency_key)
        if status in (b"full", b"too_large"):
            raise self._without_room(status, details, jobs)
        return Submission(submission, len(jobs))

    def _without_room(
        self, status: bytes, details: Sequence[Any], jobs: Sequence[NewJob]
    ) -> SchedulerError:
        """Return the error for a submission for which `submit.lua` found no room."""
        whose, held_jobs, held_bytes, max_jobs, max_bytes, unread = details
        queue, shards = f"the queue {whose.decode()}", self._settings.shards
        if max_jobs == 0:
            return ForbiddenError(f"{queue} takes no jobs: its bound on jobs is 0")
        bounds = f"the bounds are {max_jobs} jobs and {max_bytes} bytes"
        if shards > 1:
            bounds += f" in each of {shards} shards"
        if status == b"too_large":
            size = sum(len(job.spec) for job in jobs)
            return TooLargeError(
                f"{len(jobs)} of {size} bytes do not fit {queue} even when it is empty: {bounds}; "
                "send fewer at once, or smaller ones, or have the bounds raised"
            )
        held = f"{queue} holds {held_jobs} jobs and {held_bytes} bytes"
        if unread:
            held += (
                f", {unread} of them unread results, which are freed when they are read or their "
                f"submission is cancelled, and otherwise {self._settings.result_ttl:.0f} s after "
                "its end (an operator's `reltrace status` shows whose they are)"
            )
        return QueueFullError(f"{held}; {bounds}")

    async def seen(self, tenant: str, idempotency_key: str, jobs: str) -> Submission | None:
        """Return the submission that was accepted under a key, if its jobs have this `digest`."""
        shard = self._shards.for_submission(tenant, idempotency_key)
        stored: Any = await self._redis.get(shard.key("idempotency", tenant, idempotency_key))
        if stored is None:
            return None
        name, count, stored_digest = stored.decode().split(" ")
        return Submission(name, int(count), deduplicated=True) if stored_digest == jobs else None

    async def lease(
        self,
        shard: Shard,
        route: str,
        worker: str,
        epoch: str,
        count: int,
        most_batch: int,
        workers: int = 1,
        *,
        held_elsewhere: int = 0,
    ) -> Leased:
        """Lease up to `count` queued jobs of a route to a worker, `most_batch` of them batch.

        Where several workers serve the model, it comes to hold no more than its share.
        `held_elsewhere` counts the jobs that it holds in other shards.

        Raises
        ------
        SupersededError
            The worker has connected anew: `epoch` is not its session any more.
        """
        settings, bounds = self._settings, self._bounds
        status, *jobs = await shard.run(
            "lease",
            [shard.key("worker", worker), shard.key("held", worker)],
            worker,
            route,
            epoch,
            count,
            most_batch,
            bounds.max_unread,
            bounds.tenant_max_bytes,
            bounds.max_bytes,
            workers,
            settings.shards,
            held_elsewhere,
            # redis-py sends a call again whose answer came too late.
            secrets.token_hex(8),
            milliseconds(settings.result_ttl),
        )
        if status == b"superseded":
            raise SupersededError(worker)
        if status == b"repeated":
            raise RedisTimeoutError("Redis answered a lease too late")
        return Leased(
            tuple(
                LeasedJob(
                    job.decode(), int(attempt), spec, int(waited) / 1000, QueueName.parse(queue)
                )
                for job, attempt, spec, waited, queue in jobs
            ),
            empty=status == b"empty",
            isolated=status == b"isolated",
        )

    async def renew(
        self, worker: str, leases: Sequence[Lease], *, check_only: bool = False
    ) -> list[Lease]:
        """Renew leases, or only check them; return those that are not the worker's any more."""
        held = await self._shards.run("renew", _rows(leases), worker, int(not check_only))
        return [lease for lease, is_held in zip(leases, held, strict=True) if not is_held]

    async def commit(self, worker: str, chunks: Sequence[NewChunk]) -> list[int]:
        """Store chunks of results under their leases; return an outcome per chunk.

        `STORED` (now, or when it was sent before), `LOST` (the lease is not the worker's any more),
        `OUT_OF_ORDER` (a chunk before it is missing), or `TOO_LARGE` (the result passes the bound:
        what was stored of it is freed, and the job has ended with the chunk's `too_large`).
        """
        rows = [
            (c.lease.job_id, c.lease.attempt, c.number, c.end, c.data, c.too_large) for c in chunks
        ]
        return await self._shards.run(
            "commit",
            rows,
            worker,
            milliseconds(self._settings.result_ttl),
            self._bounds.max_result_bytes,
            self._bounds.tenant_max_bytes,
            replicated=True,
        )

    async def release(self, worker: str, leases: Sequence[Lease]) -> int:
        """Queue leased jobs again at once; return how many were the worker's."""
        return sum(await self._shards.run("release", _rows(leases), worker, "", 0))

    async def retry(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Queue leased jobs again after a delay, because their attempt failed.

        Returns those that have failed too often: they are still leased, and the caller ends them.
        """
        delay, most = milliseconds(self._settings.retry_delay), self._settings.max_failures
        codes = await self._shards.run("release", _rows(leases), worker, delay, most)
        return [lease for lease, code in zip(leases, codes, strict=True) if code < 0]

    async def reconcile(self, worker: str, leases: Sequence[Lease]) -> int:
        """Queue again what is leased to a worker that knows only of `leases`; return how many."""
        requeued = 0
        for shard in self._shards.all:
            known = [lease for lease in leases if self._shards.of(lease.job_id) is shard]
            flat = [value for row in _rows(known) for value in row]
            requeued += await shard.run("reconcile", [shard.key("held", worker)], worker, *flat)
        return requeued

    async def end(self, results: Sequence[TerminalResult]) -> list[QueueName | None]:
        """End jobs that no worker ends; return each one's queue, None if this did not end it."""
        rows = [
            (r.job_id, "" if r.attempt is None else r.attempt, r.state, r.data) for r in results
        ]
        settings = self._settings
        queues = await self._shards.run(
            "end",
            rows,
            milliseconds(settings.result_ttl),
            settings.max_quarantined,
            milliseconds(settings.quarantine_ttl),
        )
        return [QueueName.parse(queue) if queue else None for queue in queues]

    async def jobs(self, job_ids: Sequence[str], *, tenant: str) -> list[JobRecord | None]:
        """Look jobs up; None for one that is unknown, another tenant's, expired or read."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                key, submission = self._shards.of(job_id).key, submission_of(job_id)
                pipe.hget(key("submission", submission), "tenant")
                pipe.hmget(key("job", job_id), "state", "attempt", "worker")
            rows: list[Any] = await pipe.execute()
        return [
            JobRecord(job_id, state.decode(), int(attempt), (worker or b"").decode())
            if state and owner == tenant.encode()
            else None
            for job_id, owner, (state, attempt, worker) in zip(
                job_ids, rows[::2], rows[1::2], strict=True
            )
        ]

    async def exist(self, job_ids: Sequence[str]) -> list[bool]:
        """Tell which jobs exist: they have not ended, or their result is unread."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.exists(self._shards.of(job_id).key("job", job_id))
            rows: list[Any] = await pipe.execute()
        return [bool(row) for row in rows]

    async def ended(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for shard in self._shards.all:
            counts: Any = await self._redis.hgetall(shard.key("ended"))
            totals.update({state.decode(): int(count) for state, count in counts.items()})
        return dict(totals)


def _parts(job: NewJob, max_result_bytes: int) -> tuple[str | int | bytes, ...]:
    """Return what `submit.lua` takes of a job."""
    result_bytes = min(job.result_bytes, max_result_bytes)
    return job.route, milliseconds(job.timeout), job.spec, result_bytes


def _rows(leases: Sequence[Lease]) -> list[tuple[str, int]]:
    return [(lease.job_id, lease.attempt) for lease in leases]


def digest(jobs: Iterable[bytes], priority: str) -> str:
    """Return a digest of jobs as they were sent."""
    found = hashlib.blake2b(priority.encode(), digest_size=16)
    for spec in jobs:
        found.update(len(spec).to_bytes(8, "little"))
        found.update(spec)
    return found.hexdigest()
