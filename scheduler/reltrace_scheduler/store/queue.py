"""Jobs from submission to their end: every transition is one Lua script."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import QueueFullError
from reltrace_scheduler.store.keys import GROUP, REAPER, Keys, submission_of
from reltrace_scheduler.store.records import (
    Condemned,
    JobRecord,
    Lease,
    LeasedJob,
    NewChunk,
    NewJob,
    QueueRecord,
    Submission,
)
from reltrace_scheduler.store.scripts import Scripts

LOST, STORED = 0, 1
"""Outcomes of `Queue.commit` per chunk."""

_IDEMPOTENCY_TTL = 24 * 3600.0

# Bounds how long one script holds Redis.
_COMMIT_AT_ONCE = 256


class Queue:
    """The state machine of jobs.

    ``QUEUED -> LEASED -> SUCCEEDED | FAILED | QUARANTINED``, and from LEASED back to
    QUEUED when a lease is lost or handed back.
    """

    def __init__(self, redis: Redis, settings: Settings, keys: Keys) -> None:
        self._redis = redis
        self._settings = settings
        self._keys = keys
        self._scripts = Scripts(redis)

    async def create(self, model: str) -> None:
        """Make the queue of a model, if there is none."""
        try:
            await self._redis.xgroup_create(self._keys.queue(model), GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def submit(self, jobs: Sequence[NewJob], idempotency_key: str) -> Submission:
        """Accept jobs, all or none; they are stored when this returns.

        Raises
        ------
        QueueFullError
            The bounds on jobs or bytes would be passed; nothing was accepted.
        """
        submission = secrets.token_hex(10)
        models = list(dict.fromkeys(job.model for job in jobs))
        first_queue = 4
        number = {model: first_queue + i for i, model in enumerate(models)}
        reply = await self._scripts(
            "submit",
            [
                self._keys.idempotency(idempotency_key),
                self._keys.submission(submission),
                self._keys.load,
                *(self._keys.queue(model) for model in models),
            ],
            self._keys.prefix,
            submission,
            _milliseconds(_IDEMPOTENCY_TTL) if idempotency_key else 0,
            self._settings.max_jobs,
            self._settings.max_bytes,
            _milliseconds(time.time()),
            *(part for job in jobs for part in (number[job.model], job.model, job.spec)),
        )
        match reply[0]:
            case b"seen":
                return Submission(reply[1].decode(), int(reply[2]), deduplicated=True)
            case b"full":
                raise QueueFullError(
                    f"the queue holds {reply[1]} jobs of {reply[2]} bytes; the bounds are "
                    f"{self._settings.max_jobs} jobs and {self._settings.max_bytes} bytes"
                )
        return Submission(submission, len(jobs), deduplicated=False)

    async def lease(self, model: str, worker: str, count: int) -> list[LeasedJob]:
        """Lease up to `count` queued jobs of a model to a worker."""
        reply = await self._scripts(
            "lease", [self._keys.queue(model)], self._keys.prefix, GROUP, worker, count
        )
        return [
            LeasedJob(job.decode(), int(attempt), spec, int(queued_at) / 1000)
            for job, attempt, spec, queued_at in reply
        ]

    async def renew(self, model: str, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Renew leases; return those that the worker does not hold any more."""
        reply = await self._scripts(
            "renew",
            [self._keys.queue(model)],
            self._keys.prefix,
            GROUP,
            worker,
            *(part for lease in leases for part in (lease.job_id, lease.attempt)),
        )
        return [leases[int(number) - 1] for number in reply]

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
                [self._keys.load, self._keys.ended],
                self._keys.prefix,
                GROUP,
                worker,
                _milliseconds(self._settings.result_ttl),
                *(
                    part
                    for chunk in chunks[start : start + _COMMIT_AT_ONCE]
                    for part in (
                        submission_of(chunk.lease.job_id),
                        chunk.lease.job_id,
                        chunk.lease.attempt,
                        chunk.number,
                        chunk.end,
                        chunk.data,
                    )
                ),
            )
        return outcome

    async def requeue(self, model: str, worker: str, leases: Sequence[Lease]) -> int:
        """Queue leased jobs again at once; return how many were the worker's."""
        reply = await self._scripts(
            "requeue",
            [self._keys.queue(model)],
            self._keys.prefix,
            GROUP,
            worker,
            model,
            *(part for lease in leases for part in (lease.job_id, lease.attempt)),
        )
        return int(reply)

    async def reap(self, model: str) -> tuple[int, list[Condemned]]:
        """Take over lost leases.

        Returns
        -------
        int
            Jobs that were queued again.
        list of Condemned
            Jobs that lost too many leases. They are held under the name `REAPER`; the
            caller ends them with `commit`.
        """
        cursor, requeued, condemned = b"0-0", 0, []
        while True:
            cursor, count, jobs = await self._scripts(
                "reap",
                [self._keys.queue(model)],
                self._keys.prefix,
                GROUP,
                REAPER,
                model,
                _milliseconds(self._settings.lease),
                self._settings.max_lost_leases,
                cursor,
                100,
                _milliseconds(time.time()),
            )
            requeued += int(count)
            condemned += [
                Condemned(job.decode(), int(attempt), tuple(history.decode().splitlines()))
                for job, attempt, history in jobs
            ]
            if cursor == b"0-0":
                return requeued, condemned

    async def jobs(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """Look jobs up; None for one that is unknown, expired or acknowledged."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(self._keys.job(job_id), "state", "attempt", "worker")
            rows = await pipe.execute()
        return [
            JobRecord(job_id, state.decode(), int(attempt), (worker or b"").decode())
            if state
            else None
            for job_id, (state, attempt, worker) in zip(job_ids, rows, strict=True)
        ]

    async def depth(self, model: str) -> QueueRecord:
        """Count the queued and the leased jobs of a model."""
        queue = self._keys.queue(model)
        # A stream holds queued and leased entries; ended ones are deleted.
        length = int(await self._redis.xlen(queue))
        pending = await self._redis.xpending(queue, GROUP)
        leased = int(pending["pending"])
        by_worker = {c["name"].decode(): int(c["pending"]) for c in pending["consumers"]}
        return QueueRecord(model, max(length - leased, 0), leased, by_worker)

    async def ended(self) -> dict[str, int]:
        """Count jobs that ended, by state, since the store was made."""
        counts: Any = await self._redis.hgetall(self._keys.ended)
        return {state.decode(): int(count) for state, count in counts.items()}


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
