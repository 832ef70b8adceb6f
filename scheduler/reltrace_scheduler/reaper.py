"""Looks after what nobody asks for: lost leases, timeouts, waits and expired results."""

import asyncio
import time

import structlog
from redis.exceptions import RedisError

from reltrace_scheduler.config import Settings
from reltrace_scheduler.endings import overdue, quarantined
from reltrace_scheduler.metrics.counts import Counts
from reltrace_scheduler.store.keys import model_of
from reltrace_scheduler.store.queue import Queue
from reltrace_scheduler.store.registry import Registry
from reltrace_scheduler.store.upkeep import Upkeep

log = structlog.get_logger()

_LONGEST_PERIOD = 1.0
"""Seconds: how late a timeout, or the end of a wait, may be noticed."""


class Reaper:
    """Runs in every scheduler: each change is one atomic script, so they do not collide."""

    def __init__(
        self,
        queue: Queue,
        upkeep: Upkeep,
        registry: Registry,
        settings: Settings,
        counts: Counts,
    ) -> None:
        self._queue = queue
        self._upkeep = upkeep
        self._registry = registry
        self._settings = settings
        self._counts = counts

    async def run(self) -> None:
        """Work until cancelled.

        A lease is found lost at most a quarter of its time late, so that a job is back in
        its queue well within two lease times.
        """
        every = self._settings.lease / 4
        period = min(_LONGEST_PERIOD, every)
        reap_at = 0.0
        while True:
            try:
                if time.monotonic() >= reap_at:
                    reap_at = time.monotonic() + every
                    await self._reap()
                    await self._forget()
                await self._upkeep.promote()
                await self._end_overdue()
                await self._upkeep.expire()
            except (RedisError, OSError) as error:
                log.warning("reaper.waits", error=str(error))
            await asyncio.sleep(period)

    async def _reap(self) -> None:
        await self._upkeep.look()
        for name in await self._queue.names():
            requeued, condemned = await self._upkeep.reap(name)
            self._counts.lost.labels(model_of(name)).inc(requeued + len(condemned))
            if requeued:
                log.warning("leases.lost", queue=name, jobs=requeued)
            if condemned:
                await self._upkeep.end([quarantined(job) for job in condemned])
                self._counts.ended.labels(model_of(name), "quarantined").inc(len(condemned))
            for job in condemned:
                log.error("job.quarantined", job=job.job_id, losses=len(job.lost))

    async def _end_overdue(self) -> None:
        while jobs := await self._upkeep.overdue():
            await self._upkeep.end([overdue(job_id) for job_id in jobs])
            log.info("jobs.overdue", jobs=len(jobs))

    async def _forget(self) -> None:
        # Long enough for a worker to come back under its name after a cut line.
        before = time.time() - 10 * self._settings.lease
        for worker in await self._registry.workers():
            if worker.seen_at < before:
                await self._registry.forget(worker.worker_id, unseen_since=before)
