import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from redis.asyncio import Redis
from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.gauges import read_queues
from reltrace_scheduler.queue.job_queue import JobQueue
from reltrace_scheduler.queue.maintenance import Maintenance
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.queue.shards import Shard
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import (
    Lease,
    LeasedJob,
    NewChunk,
    NewJob,
    Priority,
    QuarantineCandidate,
    Submission,
)

MODEL = "m"
EPOCH = "epoch"


def jobs(count: int, name: str = "spec", timeout: float = 0.0) -> list[NewJob]:
    return [NewJob(MODEL, f"{name} {index}".encode(), timeout) for index in range(count)]


def lease_of(job: LeasedJob) -> Lease:
    return Lease(job.job_id, job.attempt)


def end(
    job: LeasedJob, data: bytes = b"result", number: int = 1, state: str = "SUCCEEDED"
) -> NewChunk:
    return NewChunk(lease_of(job), number, state, data)


@dataclass
class Driver:
    """The store's transitions with what most tests do not care about filled in."""

    store: Store
    maintenance: Maintenance

    @classmethod
    def over(cls, redis: Redis, settings: Settings) -> Self:
        store = Store(redis, settings)
        return cls(store, Maintenance(store.shards.all[0], settings))

    @property
    def queue(self) -> JobQueue:
        return self.store.queue

    @property
    def results(self) -> Results:
        return self.store.results

    @property
    def shard(self) -> Shard:
        return self.maintenance.shard

    async def submit(
        self,
        new: Sequence[NewJob],
        key: str = "",
        *,
        tenant: str = "t",
        priority: Priority = Priority.INTERACTIVE,
    ) -> Submission:
        return await self.queue.submit(new, tenant=tenant, priority=priority, idempotency_key=key)

    async def enter(self, worker: str) -> None:
        """Give a worker a session."""
        await self.store.redis.hset(self.shard.key("worker", worker), "epoch", EPOCH)

    async def lease(
        self, worker: str, count: int, *, most_batch: int | None = None, workers: int = 1
    ) -> list[LeasedJob]:
        await self.enter(worker)
        batch = count if most_batch is None else most_batch
        leased = await self.queue.lease(self.shard, MODEL, worker, EPOCH, count, batch, workers)
        return list(leased.jobs)

    async def commit(self, worker: str, chunks: Sequence[NewChunk]) -> list[int]:
        return await self.queue.commit(worker, chunks)

    async def reap(self) -> tuple[int, list[QuarantineCandidate]]:
        total, found = 0, []
        for name in await self.shard.queues():
            requeued, candidates = await self.maintenance.reap(name)
            total, found = total + requeued, found + candidates
        return total, found

    async def reap_until(
        self, *, requeued: int = 0, candidates: int = 0
    ) -> list[QuarantineCandidate]:
        """Reap until so much was found: leases run out on Redis' clock, not on ours."""
        total, found = 0, []
        async with asyncio.timeout(10):
            while total < requeued or len(found) < candidates:
                count, lost = await self.reap()
                total, found = total + count, found + lost
                await asyncio.sleep(0.02)
        assert (total, len(found)) == (requeued, candidates)
        return found

    async def depth(self) -> tuple[int, int]:
        """Queued and leased jobs."""
        gauges = [g for g in await read_queues(self.store) if g.model == MODEL]
        return sum(g.queued for g in gauges), sum(g.leased for g in gauges)
