"""Runs the maintenance of the queue: lost leases, timeouts, delays and expired results."""

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

import structlog
from redis.exceptions import ResponseError

from reltrace_scheduler.api.terminal_results import end, overdue, quarantined, stalled
from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.maintenance import Maintenance
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.queue.trouble import log_trouble, trouble_of
from reltrace_scheduler.records import Submission, TerminalResult

log = structlog.get_logger()

_MAX_PERIOD = 1.0
"""Seconds between looks for ended timeouts and delays."""


async def attempt(step: str, work: Awaitable[object], counts: Counts) -> None:
    """Do one step of the maintenance; a failure is counted and logged, and stops no other step."""
    try:
        await work
    except Exception as error:
        # Whatever it is: upkeep that has ended is noticed only when memory is full.
        counts.maintenance_failures.labels(step).inc()
        log_trouble("maintenance.failed", error, step=step)


class Reaper:
    """Runs in every scheduler: each change is one atomic script, so that they do not conflict.

    Every step stands alone, for each shard, queue and submission: one that fails is counted and
    logged, and the others go on.
    """

    def __init__(self, store: Store, counts: Counts) -> None:
        self._store = store
        self._counts = counts

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Return one loop for each shard; each works until it is cancelled."""
        settings = self._store.settings
        return [self._maintain(Maintenance(shard, settings)) for shard in self._store.shards.all]

    async def _maintain(self, maintenance: Maintenance) -> None:
        # A lease is found lost at most a quarter of its time late, so that a job is back in its
        # queue well within two lease times.
        every = self._store.settings.lease / 4
        period = min(_MAX_PERIOD, every)
        reap_at = 0.0
        while True:
            # First: it frees the memory that the others may need.
            await self._step("expire", self._expire(maintenance))
            await self._step("timeouts", self._end_overdue(maintenance))
            await self._step("delays", maintenance.promote())
            if time.monotonic() >= reap_at:
                reap_at = time.monotonic() + every
                await self._step("watchdog", maintenance.watchdog_tick())
                await self._step("leases", self._reap(maintenance))
                await self._step("stalled", self._end_stalled(maintenance))
                if maintenance.shard is self._store.shards.all[0]:
                    await self._step("workers", self._forget_workers())
            await asyncio.sleep(period)

    async def _step(self, name: str, work: Awaitable[object]) -> None:
        await attempt(name, work, self._counts)

    async def _reap(self, maintenance: Maintenance) -> None:
        for name in await maintenance.shard.queues():
            await self._step("leases", self._reap_queue(maintenance, name))

    async def _reap_queue(self, maintenance: Maintenance, name: bytes) -> None:
        queue = QueueName.parse(name)
        requeued, candidates = await maintenance.reap(name)
        self._counts.lost.labels(queue.route).inc(requeued + len(candidates))
        if requeued:
            log.warning("leases.lost", queue=str(queue), jobs=requeued)
        await self._end("leases", [quarantined(job) for job in candidates])
        for job in candidates:
            log.error(
                "job.quarantined",
                job=job.job_id,
                tenant=queue.tenant,
                workers=[lost.worker for lost in job.lost],
            )

    async def _end_overdue(self, maintenance: Maintenance) -> None:
        while jobs := await maintenance.overdue():
            await self._end("timeouts", [overdue(job_id) for job_id in jobs])
            await maintenance.put_off(jobs)
            log.info("jobs.overdue", jobs=len(jobs))

    async def _expire(self, maintenance: Maintenance) -> None:
        """Free expired results for a limited time; the rest follows in the next round."""
        until = time.monotonic() + _MAX_PERIOD
        more = True
        while more and time.monotonic() < until:
            more, waiting = await maintenance.expire()
            for submission in waiting:
                await self._step("expire", self._end_submission(maintenance, submission))

    async def _end_stalled(self, maintenance: Maintenance) -> None:
        streams = self._store.results.open_streams
        shard = maintenance.shard
        await maintenance.note_readers(s for s in streams if self._store.shards.of(s) is shard)
        for submission in await maintenance.stalled_submissions():
            await self._step("stalled", self._end_submission(maintenance, submission))

    async def _end_submission(self, maintenance: Maintenance, submission: Submission) -> None:
        ended = await self._end("stalled", [stalled(job_id) for job_id in submission.job_ids])
        await maintenance.expire_now(submission.id)
        log.warning("submission.stalled", submission=submission.id, jobs=ended)

    async def _end(self, step: str, results: Sequence[TerminalResult]) -> int:
        """End jobs; where one of them breaks the script, the others without it."""
        try:
            return await end(self._store, self._counts, results)
        except ResponseError as error:
            if trouble_of(error) or len(results) == 1:
                raise
        for result in results:
            await self._step(step, end(self._store, self._counts, [result]))
        return len(results)

    async def _forget_workers(self) -> None:
        registry = self._store.registry
        for worker_id in await registry.unseen():
            await self._step("workers", registry.forget(worker_id, unseen=True))
