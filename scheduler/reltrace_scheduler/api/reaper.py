"""Runs the maintenance of the queue: lost leases, timeouts, delays and expired results."""

import asyncio
import time
from collections.abc import Sequence

import structlog
from redis.exceptions import RedisError

from reltrace_scheduler.api.terminal_results import end, overdue, quarantined, stalled
from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.maintenance import EXPIRE_AT_ONCE, Maintenance
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Submission

log = structlog.get_logger()

_MAX_PERIOD = 1.0
"""Seconds between looks for ended timeouts and delays."""


class Reaper:
    """Runs in every scheduler: each change is one atomic script, so that they do not conflict."""

    def __init__(self, store: Store, counts: Counts) -> None:
        self._store = store
        self._counts = counts
        self._maintenance = [Maintenance(shard, store.settings) for shard in store.shards.all]

    async def run(self) -> None:
        """Work until cancelled.

        A lease is found lost at most a quarter of its time late, so that a job is back in
        its queue well within two lease times.
        """
        every = self._store.settings.lease / 4
        period = min(_MAX_PERIOD, every)
        reap_at = 0.0
        while True:
            try:
                due = time.monotonic() >= reap_at
                if due:
                    reap_at = time.monotonic() + every
                for maintenance in self._maintenance:
                    if due:
                        await self._reap(maintenance)
                        await self._end_stalled(
                            maintenance, await maintenance.stalled_submissions()
                        )
                    await maintenance.promote()
                    await self._end_overdue(maintenance)
                    await self._expire(maintenance)
                if due:
                    await self._forget_workers()
            except (RedisError, OSError) as error:
                log.warning("reaper.waits", error=str(error))
            await asyncio.sleep(period)

    async def _reap(self, maintenance: Maintenance) -> None:
        await maintenance.watchdog_tick()
        for name in await maintenance.shard.queues():
            queue = QueueName.parse(name)
            requeued, candidates = await maintenance.reap(name)
            self._counts.lost.labels(queue.route).inc(requeued + len(candidates))
            if requeued:
                log.warning("leases.lost", queue=str(queue), jobs=requeued)
            await end(self._store, self._counts, [quarantined(job) for job in candidates])
            for job in candidates:
                log.error(
                    "job.quarantined",
                    job=job.job_id,
                    tenant=queue.tenant,
                    workers=[lost.worker for lost in job.lost],
                )

    async def _end_overdue(self, maintenance: Maintenance) -> None:
        while jobs := await maintenance.overdue():
            await end(self._store, self._counts, [overdue(job_id) for job_id in jobs])
            log.info("jobs.overdue", jobs=len(jobs))

    async def _expire(self, maintenance: Maintenance) -> None:
        """Free expired results for a limited time; the rest follows in the next round."""
        until = time.monotonic() + _MAX_PERIOD
        freed = EXPIRE_AT_ONCE
        while freed == EXPIRE_AT_ONCE and time.monotonic() < until:
            freed, waiting = await maintenance.expire()
            await self._end_stalled(maintenance, waiting)

    async def _end_stalled(
        self, maintenance: Maintenance, submissions: Sequence[Submission]
    ) -> None:
        for submission in submissions:
            results = [stalled(job_id) for job_id in submission.job_ids]
            ended = await end(self._store, self._counts, results)
            await maintenance.expire_now(submission.id)
            log.warning("submission.stalled", submission=submission.id, jobs=ended)

    async def _forget_workers(self) -> None:
        # Late enough for a worker to come back under its name after a lost connection.
        registry, before = self._store.registry, time.time() - 10 * self._store.settings.lease
        for worker_id in await registry.unseen(since=before):
            await registry.forget(worker_id, unseen_since=before)
