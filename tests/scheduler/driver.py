import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from redis.asyncio import Redis
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.maintenance import Upkeep
from reltrace_scheduler.queue.queue import Queue
from reltrace_scheduler.records import (
    Condemned,
    Lease,
    LeasedJob,
    NewChunk,
    NewJob,
    Priority,
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

    redis: Redis
    keys: Keys
    queue: Queue
    upkeep: Upkeep

    @classmethod
    def over(cls, redis: Redis, keys: Keys, settings: Settings) -> Self:
        return cls(redis, keys, Queue(redis, settings, keys), Upkeep(redis, settings, keys))

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
        await self.redis.hset(self.keys.worker(worker), "epoch", EPOCH)

    async def lease(
        self, worker: str, count: int, *, most_batch: int | None = None, workers: int = 1
    ) -> list[LeasedJob]:
        await self.enter(worker)
        batch = count if most_batch is None else most_batch
        leased = await self.queue.lease(MODEL, worker, EPOCH, count, batch, workers)
        return list(leased.jobs)

    async def commit(self, worker: str, chunks: Sequence[NewChunk]) -> list[int]:
        return await self.queue.commit(worker, chunks)

    async def reap(self) -> tuple[int, list[Condemned]]:
        total, found = 0, []
        for name in await self.queue.names():
            requeued, condemned = await self.upkeep.reap(name)
            total, found = total + requeued, found + condemned
        return total, found

    async def reap_until(self, *, requeued: int = 0, condemned: int = 0) -> list[Condemned]:
        """Reap until so much was found: leases run out on Redis' clock, not on ours."""
        total, found = 0, []
        async with asyncio.timeout(10):
            while total < requeued or len(found) < condemned:
                count, lost = await self.reap()
                total, found = total + count, found + lost
                await asyncio.sleep(0.02)
        assert (total, len(found)) == (requeued, condemned)
        return found

    async def depth(self) -> tuple[int, int]:
        """Queued and leased jobs."""
        record = (await self.queue.depths()).get(MODEL)
        return (record.queued, record.leased) if record else (0, 0)
