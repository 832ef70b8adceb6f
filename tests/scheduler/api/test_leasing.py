"""What one worker is leased, out of several queues: routes, shards, and jobs that wait apart."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis
from reltrace_scheduler.api.leasing import EmptyQueueCache, Leasing
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.maintenance import Maintenance
from reltrace_scheduler.queue.signals import Listener, Signals
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import (
    Lease,
    LeasedJob,
    NewChunk,
    NewJob,
    Priority,
    WorkerRecord,
)
from reltrace_scheduler.tasks import end

ROUTES = ("a", "b")
SHARDS = 3


class Workers:
    """Workers of two models over a queue of three shards."""

    def __init__(self, store: Store, signals: Signals, heard: Listener) -> None:
        self.store = store
        self._heard = heard
        self._empty = EmptyQueueCache(signals)
        self._models = ModelCache(store.registry)

    async def connect(self, name: str) -> Leasing:
        """Enter a worker with room for a thousand jobs."""
        record = WorkerRecord(worker_id=name, hello=b"", routes=ROUTES, epoch="epoch")
        await self.store.registry.add(record, dict.fromkeys(ROUTES, b""))
        leasing = Leasing(self.store, self._models, self._empty, record)
        leasing.add_credit(1000)
        return leasing

    async def submit(self, route: str, count: int, **options: object) -> list[str]:
        jobs = [NewJob(route, b"spec") for _ in range(count)]
        self._heard.clear()
        submission = await self.store.queue.submit(jobs, tenant="t", **options)  # type: ignore[arg-type]
        # Until then, a queue that was found empty is not asked again.
        assert await self._heard.wait_and_clear(10)
        return list(submission.job_ids)

    async def lose(self, worker: str) -> None:
        """Let all leases of a worker run out, and be found lost."""
        requeued = 0
        self._heard.clear()
        while not requeued:
            for shard in self.store.shards.all:
                maintenance = Maintenance(shard, self.store.settings)
                await maintenance.watchdog_tick()
                for name in await shard.queues():
                    requeued += (await maintenance.reap(name))[0]
        assert await self._heard.wait_and_clear(10)


async def everything(leasing: Leasing) -> list[LeasedJob]:
    """Lease until nothing comes any more."""
    found: list[LeasedJob] = []
    while jobs := await leasing.lease():
        found += jobs
    return found


@pytest.fixture
async def workers(store: Redis, settings: Settings) -> AsyncIterator[Workers]:
    sharded = replace(settings, shards=SHARDS, max_jobs=3000, tenant_max_jobs=3000)
    queue, signals = Store(store, sharded), Signals(store)
    channels = [shard.key("wake", route) for shard in queue.shards.all for route in ROUTES]
    listening = asyncio.create_task(signals.run())
    async with signals.listen(*channels) as heard:
        assert await heard.wait_and_clear(10)
        yield Workers(queue, signals, heard)
    await end([listening])


async def test_jobs_come_from_every_route_and_every_shard(workers: Workers) -> None:
    submitted = [
        job
        for number in range(40)
        for job in await workers.submit(ROUTES[number % 2], 2, idempotency_key=str(number))
    ]
    worker = await workers.connect("w")
    leased = await everything(worker)
    assert sorted(job.job_id for job in leased) == sorted(submitted)
    assert {workers.store.shards.of(job.job_id).key.shard for job in leased} == set(range(SHARDS))
    held = {worker.held[Lease(job.job_id, job.attempt)].route for job in leased}
    assert held == set(ROUTES)


async def test_no_more_than_there_is_room_for_from_all_together(workers: Workers) -> None:
    for number in range(12):
        await workers.submit(ROUTES[number % 2], 10, idempotency_key=str(number))
    worker = await workers.connect("w")
    worker.stop()
    worker.add_credit(25)
    assert len(await everything(worker)) == 25


async def test_who_wants_no_more_gets_no_more(workers: Workers) -> None:
    await workers.submit("a", 5)
    worker = await workers.connect("w")
    worker.stop()
    assert await everything(worker) == []


async def test_batch_leaves_room_for_what_somebody_waits_for(workers: Workers) -> None:
    """
    Given more jobs of batch than a worker has room for
    I expect a quarter of its room to stay free of them, over all shards.
    """
    for number in range(30):
        await workers.submit("a", 20, priority=Priority.BATCH, idempotency_key=str(number))
    worker = await workers.connect("w")
    worker.stop()
    worker.add_credit(400)
    leased = await everything(worker)
    assert 250 <= len(leased) <= 300
    await workers.submit("b", 5)
    assert {job.queue.queue_class for job in await worker.lease()} == {Priority.INTERACTIVE}


async def test_isolated_jobs_are_held_alone_whatever_else_waits(workers: Workers) -> None:
    """
    Given jobs of one shard whose worker fell silent, and others in all shards
    If a worker asks for all it can get
    I expect it to hold isolated jobs and nothing else, or none of them, at every moment.
    """
    lost = await workers.submit("a", 3, idempotency_key="lost")
    assert len(await everything(await workers.connect("silent"))) == 3
    await workers.lose("silent")
    others = [
        job
        for number in range(9)
        for job in await workers.submit(ROUTES[number % 2], 4, idempotency_key=str(number))
    ]
    worker = await workers.connect("w")
    seen: list[str] = []
    for _ in range(100):
        jobs = await worker.lease()
        held = {queue.queue_class for queue in worker.held.values()}
        assert held in (set(), {"isolate_group"}, {Priority.INTERACTIVE}), held
        if not jobs:
            seen += [lease.job_id for lease in worker.held]
            await _end(workers, list(worker.held))
            worker.drop(list(worker.held))
        if len(seen) == len(lost) + len(others):
            break
    assert sorted(seen) == sorted(lost + others)


async def _end(workers: Workers, leases: list[Lease]) -> None:
    chunks = [NewChunk(lease, 1, "SUCCEEDED", b"data") for lease in leases]
    assert all(code >= 0 for code in await workers.store.queue.commit("w", chunks))
