"""What time and operators do to jobs: leases run out, waits end, results expire."""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.config import Settings
from reltrace_scheduler.store.keys import REAPER, Keys
from reltrace_scheduler.store.queue import milliseconds
from reltrace_scheduler.store.records import Condemned, DeadJob, Ending, LostLease
from reltrace_scheduler.store.scripts import Scripts

_AT_ONCE = 500
"""Jobs that one script moves: bounds how long it holds Redis."""

_END_AT_ONCE = 256


class Upkeep:
    """Transitions that no worker and no reader asks for.

    ``LEASED -> QUEUED`` when a lease is lost, and from QUEUED or LEASED to
    ``FAILED | CANCELLED | QUARANTINED`` from outside.
    """

    def __init__(self, redis: Redis, settings: Settings, keys: Keys) -> None:
        self._redis = redis
        self._settings = settings
        self._keys = keys
        self._scripts = Scripts(redis, keys)

    async def look(self) -> None:
        """Note that leases are being looked after, before each round of `reap`.

        After a gap (Redis or all schedulers were away for half a lease) no lease is taken to be
        lost for one lease's time: those who live could not renew theirs.
        """
        await self._scripts("look", [self._keys.watch], milliseconds(self._settings.lease))

    async def reap(self, queue: str) -> tuple[int, list[Condemned]]:
        """Take over the leases of one queue that were lost.

        Parameters
        ----------
        queue : str
            Its name, as `Queue.names` gives it.

        Returns
        -------
        int
            Jobs that were queued again.
        list of Condemned
            Jobs that lost too many leases. They are held under the name `REAPER`; the
            caller ends them with `end`.
        """
        cursor, requeued, condemned = b"0-0", 0, []
        while True:
            cursor, count, jobs = await self._scripts(
                "reap",
                [self._keys.queue(queue), self._keys.queues, self._keys.watch],
                REAPER,
                queue,
                milliseconds(self._settings.lease),
                self._settings.max_lost_leases,
                cursor,
                _AT_ONCE,
            )
            requeued += int(count)
            condemned += [
                Condemned(job.decode(), int(attempt), _history(history))
                for job, attempt, history in jobs
            ]
            if cursor == b"0-0":
                return requeued, condemned

    async def end(self, endings: Sequence[Ending]) -> list[str]:
        """End jobs from outside; return each one's queue by name, "" if this did not end it."""
        outcome: list[str] = []
        for start in range(0, len(endings), _END_AT_ONCE):
            reply = await self._scripts(
                "end",
                [],
                milliseconds(self._settings.result_ttl),
                self._settings.max_dead,
                milliseconds(self._settings.dead_ttl),
                *(
                    part
                    for ending in endings[start : start + _END_AT_ONCE]
                    for part in (
                        ending.job_id,
                        "" if ending.attempt is None else ending.attempt,
                        ending.state,
                        ending.data,
                    )
                ),
            )
            outcome += [name.decode() for name in reply]
        return outcome

    async def promote(self) -> int:
        """Queue jobs again whose wait after a failed attempt is over; return how many."""
        return int(await self._scripts("promote", [self._keys.delayed], _AT_ONCE))

    async def overdue(self) -> list[str]:
        """Return jobs, at most some hundreds, whose timeout is over."""
        ids = await self._scripts("overdue", [self._keys.deadlines], _END_AT_ONCE)
        return [job_id.decode() for job_id in ids]

    async def now(self) -> float:
        """Return the Unix time of the shard's own clock."""
        return int(await self._scripts("now", [])) / 1000

    async def expire(self) -> int:
        """Free results that nobody acknowledged in time; return of how many submissions."""
        return int(await self._scripts("expire", [self._keys.expiring], 16))

    async def dead(self, limit: int) -> list[DeadJob]:
        """Return jobs that were quarantined, latest first."""
        ids: Any = await self._redis.zrevrange(self._keys.dead, 0, limit - 1)
        return [job for job in await self.dead_jobs([i.decode() for i in ids]) if job]

    async def dead_jobs(self, job_ids: Sequence[str]) -> list[DeadJob | None]:
        """Look quarantined jobs up; None for one that is unknown or too old."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(self._keys.dead_job(job_id), "tenant", "spec", "history")
            rows: list[Any] = await pipe.execute()
        return [
            DeadJob(job_id, tenant.decode(), spec, _history(history)) if tenant else None
            for job_id, (tenant, spec, history) in zip(job_ids, rows, strict=True)
        ]

    async def forget_dead(self, job_id: str) -> None:
        """Forget a quarantined job."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrem(self._keys.dead, job_id)
            pipe.delete(self._keys.dead_job(job_id))
            await pipe.execute()


def _history(lines: bytes) -> tuple[LostLease, ...]:
    rows = (line.split(" ") for line in lines.decode().splitlines())
    return tuple(LostLease(int(n), worker, int(at) / 1000) for n, worker, at in rows)
