"""Finds leases that were lost, and workers that are gone."""

import asyncio
import time

import structlog
from google.rpc import code_pb2
from redis.exceptions import RedisError
from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.config import Settings
from reltrace_scheduler.store.keys import REAPER
from reltrace_scheduler.store.queue import Queue
from reltrace_scheduler.store.records import Condemned, Lease, NewChunk
from reltrace_scheduler.store.registry import Registry

log = structlog.get_logger()


class Reaper:
    """Runs in every scheduler: each takeover is one atomic script, so they do not collide."""

    def __init__(self, queue: Queue, registry: Registry, settings: Settings) -> None:
        self._queue = queue
        self._registry = registry
        self._settings = settings

    async def run(self) -> None:
        """Look for lost leases until cancelled.

        A lease is found lost at most a quarter of its time late, so that a job is back in
        its queue well within two lease times.
        """
        while True:
            try:
                for model in await self._registry.models():
                    await self._reap(model)
                await self._forget()
            except (RedisError, OSError) as error:
                log.warning("reaper.waits", error=str(error))
            await asyncio.sleep(self._settings.lease / 4)

    async def _reap(self, model: str) -> None:
        await self._queue.create(model)
        requeued, condemned = await self._queue.reap(model)
        if requeued:
            log.warning("leases.lost", model=model, jobs=requeued)
        for job in condemned:
            log.error("job.quarantined", job=job.job_id, history=job.history)
            await self._queue.commit(REAPER, [_quarantine(job)])

    async def _forget(self) -> None:
        # Long enough for a worker to come back under its name after a cut line.
        before = time.time() - 10 * self._settings.lease
        for worker in await self._registry.workers():
            if worker.seen_at < before:
                await self._registry.forget(worker.worker_id, worker.model, unseen_since=before)


def _quarantine(job: Condemned) -> NewChunk:
    history = "; ".join(
        f"attempt {attempt} on {worker}"
        for attempt, worker, _ in (line.split(" ") for line in job.history)
    )
    chunk = types_pb2.ResultChunk(
        job_id=job.job_id,
        number=1,
        end=types_pb2.JobEnd(
            state=types_pb2.JOB_STATE_QUARANTINED,
            attempt=job.attempt,
            error=types_pb2.JobError(
                code=code_pb2.ABORTED,
                message=f"lost its worker {len(job.history)} times and is quarantined: {history}",
            ),
        ),
    )
    return NewChunk(Lease(job.job_id, job.attempt), 1, "QUARANTINED", chunk.SerializeToString())
