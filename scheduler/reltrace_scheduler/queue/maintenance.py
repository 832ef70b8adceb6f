"""What time and operators do to jobs: leases run out, waits end, results expire."""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import REAPER, Keys
from reltrace_scheduler.queue.queue import milliseconds
from reltrace_scheduler.queue.scripts import Scripts
from reltrace_scheduler.records import Abandoned, Condemned, Ending, LostLease, QuarantinedJob

_AT_ONCE = 500
"""Jobs that one script moves: bounds how long it holds Redis."""

_END_AT_ONCE = 256

_QUARANTINED_AT_ONCE, _QUARANTINED_BYTES = 4, 32 << 20
"""Quarantined jobs that are read at a time, and bytes of theirs that one listing has."""

EXPIRE_AT_ONCE = 16
"""Submissions whose results one script frees."""


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
                self._settings.max_quarantined,
                milliseconds(self._settings.quarantine_ttl),
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

    async def expire(self) -> tuple[int, list[Abandoned]]:
        """Free results that nobody acknowledged in time.

        Returns
        -------
        int
            Of how many submissions; as many as `EXPIRE_AT_ONCE`: there may be more.
        list of Abandoned
            Those whose jobs wait for a reader who has not come for as long. The caller ends their
            jobs, and then lets them `go`.
        """
        freed, *waiting = await self._scripts("expire", [self._keys.expiring], EXPIRE_AT_ONCE)
        return int(freed), [Abandoned(name.decode(), int(jobs)) for name, jobs in waiting]

    async def go(self, submission: str) -> None:
        """Let the results of a submission that has ended be freed next."""
        await self._redis.zadd(self._keys.expiring, {submission: 0}, xx=True)

    async def unread(self) -> list[Abandoned]:
        """Return what tenants have that were passed over for as long as results are kept.

        Their unread results take all the room that there is for them, and nobody has read any
        since. Of their submissions those that have results and have not ended: no other ever will.
        """
        since = await self.now() - self._settings.result_ttl
        full: Any = await self._redis.zrangebyscore(self._keys.full, "-inf", milliseconds(since))
        if not full:
            return []
        found: list[Abandoned] = []
        # Only here are all submissions looked at, and rarely: an index of them would cost each.
        pattern = self._keys.submission("*")
        names = [key async for key in self._redis.scan_iter(match=pattern, count=1000)]
        for start in range(0, len(names), _AT_ONCE):
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names[start : start + _AT_ONCE]:
                    pipe.hmget(name.decode(), "tenant", "jobs", "ended", "stored")
                rows: list[Any] = await pipe.execute()
            for name, (tenant, jobs, ended, stored) in zip(names[start:], rows, strict=False):
                if tenant in full and int(ended) < int(jobs) and int(stored or 0) > 0:
                    submission = name.decode().removeprefix(pattern[:-1])
                    found.append(Abandoned(submission, int(jobs)))
        await self._redis.zrem(self._keys.full, *full)
        return found

    async def quarantined(self, limit: int) -> list[QuarantinedJob]:
        """Return jobs that were quarantined, latest first; of large ones, fewer than `limit`."""
        ids: Any = await self._redis.zrevrange(self._keys.quarantined, 0, limit - 1)
        found: list[QuarantinedJob] = []
        room = _QUARANTINED_BYTES
        for start in range(0, len(ids), _QUARANTINED_AT_ONCE):
            page = [name.decode() for name in ids[start : start + _QUARANTINED_AT_ONCE]]
            for job in await self.quarantined_jobs(page):
                if job is None:
                    continue
                room -= len(job.spec)
                if room < 0 and found:
                    return found
                found.append(job)
        return found

    async def quarantined_jobs(self, job_ids: Sequence[str]) -> list[QuarantinedJob | None]:
        """Look quarantined jobs up; None for one that is unknown or too old."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(self._keys.quarantined_job(job_id), "tenant", "spec", "history")
            rows: list[Any] = await pipe.execute()
        return [
            QuarantinedJob(job_id, tenant.decode(), spec, _history(history)) if tenant else None
            for job_id, (tenant, spec, history) in zip(job_ids, rows, strict=True)
        ]

    async def forget_quarantined(self, job_id: str) -> None:
        """Forget a quarantined job."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrem(self._keys.quarantined, job_id)
            pipe.delete(self._keys.quarantined_job(job_id))
            await pipe.execute()


def _history(lines: bytes) -> tuple[LostLease, ...]:
    rows = (line.split(" ") for line in lines.decode().splitlines())
    return tuple(LostLease(int(n), worker, int(at) / 1000) for n, worker, at in rows)
