"""Jobs on their way from clients to workers and back: every transition is one Lua script."""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import IdempotencyError, QueueFullError, SupersededError
from reltrace_scheduler.keys import GROUP, Keys, model_of, submission_id, submission_of
from reltrace_scheduler.queue.scripts import Scripts
from reltrace_scheduler.records import (
    JobRecord,
    Lease,
    Leased,
    LeasedJob,
    NewChunk,
    NewJob,
    Priority,
    QueueRecord,
    Submission,
)

LOST, STORED = 0, 1
"""Outcomes of `Queue.commit` per chunk."""

_IDEMPOTENCY_TTL = 24 * 3600.0

# Bounds how long one script holds Redis.
_COMMIT_AT_ONCE = 256


class Queue:
    """The state machine of jobs, as clients and workers move it.

    ``QUEUED -> LEASED -> SUCCEEDED | FAILED``, and from LEASED back to QUEUED when a lease
    is handed back. What time and operators do is in `Upkeep`.
    """

    def __init__(self, redis: Redis, settings: Settings, keys: Keys) -> None:
        self._redis = redis
        self._settings = settings
        self._keys = keys
        self._scripts = Scripts(redis, keys)

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
        QueueFullError
            The bounds on jobs or bytes would be passed; nothing was accepted.
        IdempotencyError
            The key was used for other jobs.
        """
        settings = self._settings
        submission = submission_id(secrets.token_hex(10), self._keys.shard)
        reply = await self._scripts(
            "submit",
            [
                self._keys.idempotency(tenant, idempotency_key),
                self._keys.submission(submission),
                self._keys.load,
                self._keys.tenant(tenant),
                self._keys.tenants,
            ],
            submission,
            tenant,
            priority,
            milliseconds(_IDEMPOTENCY_TTL) if idempotency_key else 0,
            digest([job.sent or job.spec for job in jobs], priority) if idempotency_key else "-",
            settings.max_jobs,
            settings.max_bytes,
            settings.tenant_max_jobs,
            settings.tenant_max_bytes,
            settings.shards,
            *(part for job in jobs for part in (job.route, milliseconds(job.timeout), job.spec)),
        )
        match reply[0]:
            case b"seen":
                return Submission(reply[1].decode(), int(reply[2]), deduplicated=True)
            case b"differs":
                raise IdempotencyError(idempotency_key)
            case b"full":
                _, whose, held_jobs, held_bytes, max_jobs, max_bytes = reply
                raise QueueFullError(
                    f"the queue {whose.decode()} holds {held_jobs} jobs and {held_bytes} bytes "
                    f"(unread results among them); the bounds are {max_jobs} jobs and "
                    f"{max_bytes} bytes"
                )
        return Submission(submission, len(jobs), deduplicated=False)

    async def seen(self, tenant: str, idempotency_key: str, jobs: str) -> Submission | None:
        """Return what was accepted under a key, if it was jobs of this `digest`."""
        stored: Any = await self._redis.get(self._keys.idempotency(tenant, idempotency_key))
        if stored is None:
            return None
        name, count, had = stored.decode().split(" ")
        return Submission(name, int(count), deduplicated=True) if had == jobs else None

    async def lease(
        self,
        route: str,
        worker: str,
        epoch: str,
        count: int,
        most_batch: int,
        workers: int = 1,
        *,
        elsewhere: int = 0,
    ) -> Leased:
        """Lease up to `count` queued jobs of a route to a worker, `most_batch` of them batch.

        Where several workers serve the model, it comes to hold no more than its share.
        `elsewhere` is what it holds from other shards.

        Raises
        ------
        SupersededError
            The worker has connected anew: `epoch` is not its session any more.
        """
        settings = self._settings
        status, *jobs = await self._scripts(
            "lease",
            [
                self._keys.worker(worker),
                self._keys.held(worker),
                self._keys.clock,
                self._keys.load,
            ],
            worker,
            route,
            epoch,
            count,
            most_batch,
            settings.max_unread,
            settings.tenant_max_bytes,
            settings.max_bytes,
            workers,
            settings.shards,
            elsewhere,
            # A driver that waits for an answer in vain sends the same call again.
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
                    job_id=job.decode(),
                    attempt=int(attempt),
                    spec=spec,
                    queued_for=int(waited) / 1000,
                    queue_class=queue_class.decode(),
                    tenant=tenant.decode(),
                    route=route,
                )
                for job, attempt, spec, waited, queue_class, tenant in jobs
            ),
            idle=status == b"idle",
            suspects=status == b"suspects",
        )

    async def renew(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Renew leases; return those that the worker does not hold any more."""
        if not leases:
            return []
        reply = await self._scripts("renew", [], worker, *_flat(leases))
        return [leases[int(number) - 1] for number in reply]

    async def lost(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Return those leases that the worker does not hold any more; renew none."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for lease in leases:
                pipe.hmget(self._keys.job(lease.job_id), "state", "worker", "attempt")
            rows: list[Any] = await pipe.execute()
        return [
            lease
            for lease, row in zip(leases, rows, strict=True)
            if row != [b"LEASED", worker.encode(), str(lease.attempt).encode()]
        ]

    async def commit(self, worker: str, chunks: Sequence[NewChunk]) -> list[int]:
        """Store chunks of results under their leases.

        Returns
        -------
        list of int
            Per chunk: `STORED` (now, or when it was sent before), `LOST` (the lease is no
            longer the worker's), or -1 (a chunk before it is missing).
        """
        outcome: list[int] = []
        for start in range(0, len(chunks), _COMMIT_AT_ONCE):
            outcome += await self._scripts(
                "commit",
                [],
                worker,
                milliseconds(self._settings.result_ttl),
                *(
                    part
                    for chunk in chunks[start : start + _COMMIT_AT_ONCE]
                    for part in (
                        chunk.lease.job_id,
                        chunk.lease.attempt,
                        chunk.number,
                        chunk.end,
                        chunk.data,
                    )
                ),
            )
        return outcome

    async def release(self, worker: str, leases: Sequence[Lease]) -> int:
        """Queue leased jobs again at once; return how many were the worker's."""
        reply = await self._scripts("release", [], worker, "", 0, *_flat(leases))
        return int(reply[0])

    async def retry(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Queue leased jobs again after a while, because their attempt failed.

        Returns
        -------
        list of Lease
            Those that have failed too often: they are still leased, and the caller ends them.
        """
        _, *exhausted = await self._scripts(
            "release",
            [],
            worker,
            milliseconds(self._settings.retry_delay),
            self._settings.max_failures,
            *_flat(leases),
        )
        return [Lease(job.decode(), int(attempt)) for job, attempt in exhausted]

    async def reconcile(self, worker: str, leases: Sequence[Lease]) -> int:
        """Queue again what is leased to a worker that knows only of `leases`."""
        reply = await self._scripts("reconcile", [self._keys.held(worker)], worker, *_flat(leases))
        return int(reply)

    async def jobs(self, job_ids: Sequence[str], *, tenant: str) -> list[JobRecord | None]:
        """Look jobs up; None for one that is unknown, another tenant's, expired or read."""
        owners = await self._owners({submission_of(job_id) for job_id in job_ids})
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(self._keys.job(job_id), "state", "attempt", "worker")
            rows = await pipe.execute()
        return [
            JobRecord(job_id, state.decode(), int(attempt), (worker or b"").decode())
            if state and owners[submission_of(job_id)] == tenant
            else None
            for job_id, (state, attempt, worker) in zip(job_ids, rows, strict=True)
        ]

    async def _owners(self, submissions: set[str]) -> dict[str, str]:
        names = sorted(submissions)
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hget(self._keys.submission(name), "tenant")
            rows: list[Any] = await pipe.execute()
        return {name: (tenant or b"").decode() for name, tenant in zip(names, rows, strict=True)}

    async def names(self) -> list[str]:
        """Return the names of all queues that exist."""
        members: Any = await self._redis.smembers(self._keys.queues)
        return sorted(name.decode() for name in members)

    async def depths(self) -> dict[str, QueueRecord]:
        """Count the queued and the leased jobs of each model that has any."""
        names = await self.names()
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.xlen(self._keys.queue(name))
                pipe.xpending(self._keys.queue(name), GROUP)
            rows: list[Any] = await pipe.execute(raise_on_error=False)
        totals: dict[str, tuple[int, int]] = {}
        for name, length, pending in zip(names, rows[::2], rows[1::2], strict=True):
            # A queue that became empty since its name was read is gone.
            leased = 0 if isinstance(pending, Exception) else int(pending["pending"])
            queued, all_leased = totals.get(model_of(name), (0, 0))
            # A stream holds queued and leased entries; ended ones are deleted.
            totals[model_of(name)] = (queued + int(length) - leased, all_leased + leased)
        return {m: QueueRecord(m, queued, leased) for m, (queued, leased) in totals.items()}

    async def ended(self) -> dict[str, int]:
        """Count jobs that ended, by state, since the store was made."""
        counts: Any = await self._redis.hgetall(self._keys.ended)
        return {state.decode(): int(count) for state, count in counts.items()}


def milliseconds(seconds: float) -> int:
    """Return seconds as Redis takes them."""
    return int(seconds * 1000)


def _flat(leases: Sequence[Lease]) -> list[str | int]:
    return [part for lease in leases for part in (lease.job_id, lease.attempt)]


def digest(jobs: Iterable[bytes], priority: str) -> str:
    """Return what tells jobs, as they were sent, from all others."""
    found = hashlib.blake2b(priority.encode(), digest_size=16)
    for spec in jobs:
        found.update(len(spec).to_bytes(8, "little"))
        found.update(spec)
    return found.hexdigest()
