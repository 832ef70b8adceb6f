"""Looks after what nobody asks for: lost leases, timeouts, waits and expired results."""

import asyncio
import time
from collections.abc import Sequence

import structlog
from redis.exceptions import RedisError

from reltrace_scheduler.api.terminal_results import abandoned, end, overdue, quarantined
from reltrace_scheduler.keys import model_of, tenant_of
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.maintenance import EXPIRE_AT_ONCE
from reltrace_scheduler.queue.store import Shard, Store
from reltrace_scheduler.records import Abandoned

log = structlog.get_logger()

_LONGEST_PERIOD = 1.0
"""Seconds: how late a timeout, or the end of a wait, may be noticed."""


class Reaper:
    """Runs in every scheduler: each change is one atomic script, so they do not collide."""

    def __init__(self, store: Store, counts: Counts) -> None:
        self._store = store
        self._counts = counts

    async def run(self) -> None:
        """Work until cancelled.

        A lease is found lost at most a quarter of its time late, so that a job is back in
        its queue well within two lease times.
        """
        every = self._store.settings.lease / 4
        period = min(_LONGEST_PERIOD, every)
        reap_at = 0.0
        while True:
            try:
                due = time.monotonic() >= reap_at
                if due:
                    reap_at = time.monotonic() + every
                for shard in self._store.shards:
                    if due:
                        await self._reap(shard)
                        await self._abandon(shard, await shard.upkeep.unread())
                    await shard.upkeep.promote()
                    await self._end_overdue(shard)
                    await self._expire(shard)
                if due:
                    await self._forget()
            except (RedisError, OSError) as error:
                log.warning("reaper.waits", error=str(error))
            await asyncio.sleep(period)

    async def _reap(self, shard: Shard) -> None:
        await shard.upkeep.look()
        for name in await shard.queue.names():
            requeued, condemned = await shard.upkeep.reap(name)
            self._counts.lost.labels(model_of(name)).inc(requeued + len(condemned))
            if requeued:
                log.warning("leases.lost", queue=name, jobs=requeued)
            await end(self._store, self._counts, [quarantined(job) for job in condemned])
            for job in condemned:
                log.error(
                    "job.quarantined",
                    job=job.job_id,
                    tenant=tenant_of(name),
                    workers=[lost.worker for lost in job.lost],
                )

    async def _end_overdue(self, shard: Shard) -> None:
        while jobs := await shard.upkeep.overdue():
            await end(self._store, self._counts, [overdue(job_id) for job_id in jobs])
            log.info("jobs.overdue", jobs=len(jobs))

    async def _expire(self, shard: Shard) -> None:
        """Free what nobody has read in time, for a while; the rest comes with the next round."""
        until = time.monotonic() + _LONGEST_PERIOD
        freed = EXPIRE_AT_ONCE
        while freed == EXPIRE_AT_ONCE and time.monotonic() < until:
            freed, waiting = await shard.upkeep.expire()
            await self._abandon(shard, waiting)

    async def _abandon(self, shard: Shard, unread: Sequence[Abandoned]) -> None:
        for one in unread:
            ended = await end(self._store, self._counts, [abandoned(job) for job in one.job_ids])
            await shard.upkeep.go(one.submission)
            log.warning("submission.abandoned", submission=one.submission, jobs=ended)

    async def _forget(self) -> None:
        # Long enough for a worker to come back under its name after a cut line.
        registry, before = self._store.registry, time.time() - 10 * self._store.settings.lease
        for worker_id in await registry.unseen(since=before):
            await registry.forget(worker_id, unseen_since=before)
