"""Transitions that time brings about: leases run out, delays and timeouts end, results expire."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.quarantine import parse_history
from reltrace_scheduler.queue.shards import Shard, milliseconds
from reltrace_scheduler.records import QuarantineCandidate, Submission

_AT_ONCE = 500
"""Jobs that one script moves: bounds how long it holds Redis."""

_OVERDUE_AT_ONCE = 256

_PUT_OFF = 60.0
"""Seconds after which a job that could not be ended is tried again."""

_EXPIRED_AT_ONCE = 128
"""Results that one script frees: those that it reads have at most 64 KiB each."""


class Maintenance:
    """Maintenance of one shard; any number of schedulers may run it at the same time."""

    def __init__(self, shard: Shard, settings: Settings) -> None:
        self.shard = shard
        self._redis = shard.redis
        self._key = shard.key
        self._settings = settings
        self._scan_at = 0.0

    async def watchdog_tick(self) -> None:
        """Record that a scheduler looks for lost leases; called before each round of `reap`.

        After a gap (Redis or all schedulers were away for half a lease) no lease is taken to be
        lost for one lease's time: live workers could not renew theirs.
        """
        await self.shard.run("watchdog_tick", [], milliseconds(self._settings.lease))

    async def reap(self, queue: bytes) -> tuple[int, list[QuarantineCandidate]]:
        """Take over the lost leases of one queue.

        Returns how many jobs are queued again, and the jobs that lost too many leases: the reaper
        holds these until the caller quarantines them by `JobQueue.end`.
        """
        cursor, requeued, candidates = b"0-0", 0, []
        while True:
            cursor, count, jobs = await self.shard.run(
                "reap",
                [self._key("queue", queue.decode())],
                queue,
                milliseconds(self._settings.lease),
                self._settings.max_lost_leases,
                cursor,
                _AT_ONCE,
            )
            requeued += int(count)
            candidates += [
                QuarantineCandidate(job.decode(), int(attempt), parse_history(history))
                for job, attempt, history in jobs
            ]
            if cursor == b"0-0":
                return requeued, candidates

    async def promote(self) -> int:
        """Queue jobs again whose delay after a failed attempt is over; return how many."""
        return int(await self.shard.run("promote", [], _AT_ONCE))

    async def overdue(self) -> list[str]:
        """Return the first jobs whose timeout is over."""
        ids: Any = await self._redis.zrangebyscore(
            self._key("deadlines"), "-inf", await self.shard.now(), start=0, num=_OVERDUE_AT_ONCE
        )
        return [job_id.decode() for job_id in ids]

    async def put_off(self, job_ids: Sequence[str]) -> None:
        """Name those of these jobs that are still overdue in a minute again, others before."""
        later = await self.shard.now() + milliseconds(_PUT_OFF)
        await self._redis.zadd(self._key("deadlines"), dict.fromkeys(job_ids, later), xx=True)

    async def expire(self) -> tuple[bool, list[Submission]]:
        """Free results of submissions that nobody acknowledged in time, a limited number.

        Returns whether more may be due, and the submissions whose jobs waited for as long until
        results are read: the caller ends their jobs, and calls `expire_now`.
        """
        more, *waiting = await self.shard.run("expire", [], _EXPIRED_AT_ONCE)
        return bool(more), [Submission(name.decode(), int(jobs)) for name, jobs in waiting]

    async def expire_now(self, submission: str) -> None:
        """Let the results of a submission that has ended be freed next."""
        await self._redis.zadd(self._key("expiring"), {submission: 0}, xx=True)

    async def note_readers(self, submissions: Iterable[str]) -> None:
        """Note whose results are being read now."""
        # At once: streams begin and end while Redis is asked for the time.
        names = list(submissions)
        now = await self.shard.now()
        if members := dict.fromkeys(names, now):
            await self._redis.zadd(self._key("readers"), members)
        # Other schedulers note theirs as often as they look for lost leases.
        kept = max(self._settings.reader_patience, self._settings.lease)
        before = now - milliseconds(kept)
        await self._redis.zremrangebyscore(self._key("readers"), "-inf", before)

    async def stalled_submissions(self) -> list[Submission]:
        """Return submissions whose unread results keep out other jobs of their tenants.

        Those of tenants that could be leased nothing for a while, and read nothing meanwhile: the
        submissions that have no reader, if somebody waits, who reads another one or could submit
        none; and after as long as results are kept all that have not ended, because nothing else
        lets them expire.
        """
        settings, now = self._settings, await self.shard.now()
        patience = min(settings.reader_patience, settings.result_ttl)
        throttled: Any = await self._redis.zrange(
            self._key("throttled_tenants"), 0, -1, withscores=True
        )
        waiting = {tenant for tenant, since in throttled if since <= now - milliseconds(patience)}
        kept = milliseconds(settings.result_ttl)
        expired = {tenant for tenant, since in throttled if since <= now - kept}
        if not waiting or (not expired and time.monotonic() < self._scan_at):
            return []
        self._scan_at = time.monotonic() + patience / 5
        readers: Any = await self._redis.zrange(self._key("readers"), 0, -1)
        read = {name.decode() for name in readers}
        if not read and not expired:
            return []
        # This scan is rare; an index of submissions would slow down each of them.
        rows = [row async for row in self._submissions() if row.tenant in waiting]
        kept_out = {row.tenant for row in rows if row.submission.id in read}
        kept_out |= {tenant for tenant in waiting if f":{tenant.decode()}" in read}
        found = [
            row
            for row in rows
            if row.has_results
            and (
                (row.tenant in kept_out and row.submission.id not in read)
                or (row.tenant in expired and not row.has_ended)
            )
        ]
        if over := expired | {row.tenant for row in found}:
            await self._redis.zrem(self._key("throttled_tenants"), *over)
        return [row.submission for row in found]

    async def _submissions(self) -> AsyncIterator["_Row"]:
        pattern = self._key("submission", "*")
        names = [key.decode() async for key in self._redis.scan_iter(match=pattern, count=1000)]
        for start in range(0, len(names), _AT_ONCE):
            page = names[start : start + _AT_ONCE]
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in page:
                    pipe.hmget(name, "tenant", "jobs", "ended", "stored")
                found: list[Any] = await pipe.execute()
            for name, (tenant, jobs, ended, stored) in zip(page, found, strict=True):
                # Whatever is broken, the others are found.
                if None not in (tenant, jobs, ended):
                    submission = Submission(name.removeprefix(pattern[:-1]), int(jobs))
                    yield _Row(submission, tenant, int(ended) >= int(jobs), int(stored or 0) > 0)


@dataclass(frozen=True, slots=True)
class _Row:
    submission: Submission
    tenant: bytes
    has_ended: bool
    has_results: bool
