"""Upkeep goes on: whatever breaks in Redis, the other jobs, steps and shards are looked after."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio
import structlog
from reltrace_scheduler.api.reaper import Reaper
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys, partition, submission_id
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue import trouble
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import NewChunk, NewJob
from reltrace_scheduler.tasks import end
from scheduler.driver import EPOCH, MODEL, Driver, jobs, lease_of
from scheduler.redis_states import fill, make_room
from waiting import wait_until_async


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    monkeypatch.setattr(trouble, "_said", {})
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
def counts() -> Counts:
    return Counts()


def failures(counts: Counts, step: str) -> float:
    value = counts.registry.get_sample_value("reltrace_maintenance_failures_total", {"step": step})
    assert value is not None
    return value


@pytest.fixture
async def run(counts: Counts) -> AsyncIterator:
    tasks: list[asyncio.Task[None]] = []

    def start(store: Store) -> None:
        tasks.extend(asyncio.create_task(loop) for loop in Reaper(store, counts).loops())

    yield start
    assert not [task for task in tasks if task.done()]
    await end(tasks)


async def state_of(driver: Driver, job_id: str, tenant: str = "t") -> str:
    (record,) = await driver.queue.jobs([job_id], tenant=tenant)
    return record.state if record else ""


async def break_submission(store: redis.asyncio.Redis, keys: Keys, job_id: str) -> None:
    await store.delete(keys("submission", job_id.rpartition("-")[0]))


async def break_job(store: redis.asyncio.Redis, keys: Keys, job_id: str) -> None:
    await store.delete(keys("job", job_id))


async def break_type(store: redis.asyncio.Redis, keys: Keys, job_id: str) -> None:
    await store.set(keys("job", job_id), "of another type")


@pytest.mark.parametrize("breaks", [break_submission, break_job, break_type])
async def test_a_broken_job_stops_no_timeout(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys, counts: Counts, run, lines, breaks
) -> None:
    """
    Given jobs past their timeout that are broken, and another tenant's job behind them
    I expect its timeout to end it, and the broken ones to be looked at now and then at most.
    """
    for number in range(3):
        bad = await driver.submit([NewJob(MODEL, b"bad", 0.001)], tenant=f"bad{number}")
        await breaks(store, keys, bad.job_ids[0])
    good = await driver.submit([NewJob(MODEL, b"good", 0.05)])

    run(driver.store)

    async def is_ended() -> bool:
        return await state_of(driver, good.job_ids[0]) == "FAILED"

    await wait_until_async(is_ended, "the timeout", 10)

    async def is_quiet() -> bool:
        return await driver.maintenance.overdue() == []

    await wait_until_async(is_quiet, "nothing is overdue", 10)
    expected = 3 if breaks is break_type else 0
    assert failures(counts, "timeouts") == expected
    assert len([line for line in lines if line["event"] == "maintenance.failed"]) <= 1


async def test_a_broken_job_stops_no_other_lost_lease(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys, run
) -> None:
    """Given lost leases of a tenant whose jobs are broken, I expect those of others to be found."""
    bad = await driver.submit([NewJob(MODEL, b"bad")], tenant="a")
    await driver.submit([NewJob(MODEL, b"good")], tenant="b")
    assert len(await driver.lease("w", 2)) == 2
    await break_type(store, keys, bad.job_ids[0])

    run(driver.store)

    async def is_queued() -> bool:
        return (await driver.depth())[0] == 1

    await wait_until_async(is_queued, "the other job is queued again", 10)


BROKEN_STEPS = {
    "expire": "expiring", "timeouts": "deadlines", "delays": "delayed", "watchdog": "watchdog",
    "leases": "queues", "stalled": "throttled_tenants", "workers": "workers",
}  # fmt: skip


@pytest.mark.parametrize("step", BROKEN_STEPS)
async def test_a_step_that_fails_stops_no_other(
    store: redis.asyncio.Redis, settings: Settings, counts: Counts, run, step: str
) -> None:
    """
    Given two shards, and in the first of them a key that makes one step of its upkeep fail
    I expect its other steps and the other shard to go on, and the failures to be counted.
    """
    two = Store(store, Settings(lease=0.5, shards=2))
    shards = partition(2)
    broken = shards[0](BROKEN_STEPS[step])
    await store.set(broken, "of another type")
    # What each step is to remove.
    gone = [(shard, submission_id("gone", shard.shard)) for shard in shards]
    indices = ("deadlines", "delayed")
    work = [(shard(index), f"{name}-0") for shard, name in gone for index in indices]
    work += [(shard("expiring"), name) for shard, name in gone]
    work += [(shards[0]("workers"), "long gone")]
    work = [(key, member) for key, member in work if key != broken]
    for key, member in work:
        await store.zadd(key, {member: 1})
    # Of a shard without its watchdog's times no lease is known to be lost.
    queues = [shard("queues") for shard in shards[step in ("leases", "watchdog") :]]
    for key in queues:
        await store.sadd(key, "interactive:t:m")

    run(two)

    async def is_done() -> bool:
        left = [member for key, member in work if await store.zscore(key, member)]
        return not left and not await store.exists(*queues)

    await wait_until_async(is_done, "the other steps", 15)

    async def is_counted() -> bool:
        return failures(counts, step) > 0

    await wait_until_async(is_counted, "the failure is counted", 10)
    # These need what is broken for another one.
    needs = {"watchdog": {"leases"}, "leases": {"workers"}}
    others = BROKEN_STEPS.keys() - {step} - needs.get(step, set())
    assert {failures(counts, name) for name in others} == {0}


async def test_a_full_redis_is_kept_up(
    store: redis.asyncio.Redis, settings: Settings, keys: Keys, run
) -> None:
    """
    Given a Redis that is full, expired results, a lost lease, a timeout and a delay that is over
    I expect all of them to be seen to, and what clients and workers do to give memory back.
    """
    driver = Driver.over(store, settings)
    await driver.submit([NewJob(MODEL, b"expires")], tenant="expires")
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(lease_of(job), 1, "SUCCEEDED", bytes(1000))])
    await store.zadd(keys("expiring"), {job.job_id.rpartition("-")[0]: 1})
    read = await driver.submit([NewJob(MODEL, b"read")], tenant="read")
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(lease_of(job), 1, "SUCCEEDED", bytes(1000))])
    later = await driver.submit([NewJob(MODEL, b"delayed")], tenant="delayed")
    (job,) = await driver.lease("w", 1)
    await driver.queue.retry("w", [lease_of(job)])
    await store.zadd(keys("delayed"), {later.job_ids[0]: 1})
    timed = await driver.submit([NewJob(MODEL, b"timed", 0.3)], tenant="timed")
    held = await driver.submit(jobs(2), tenant="lost")
    while len(await store.smembers(keys("held", "w"))) < 3:
        await driver.lease("w", 1)
    await fill(store)
    try:
        run(driver.store)

        async def is_done() -> bool:
            jobs_left = await driver.queue.jobs(held.job_ids, tenant="lost")
            return (
                not await store.zcard(keys("delayed"))
                and await state_of(driver, timed.job_ids[0], "timed") == "FAILED"
                and {job.state for job in jobs_left if job} == {"QUEUED"}
                and await store.hget(keys("tenant", "expires"), "results") == b"0"
            )

        await wait_until_async(is_done, "the upkeep", 15)
        await driver.results.acknowledge(read.id, 1)
        assert await store.hget(keys("tenant", "read"), "results") == b"0"
        leased = await driver.queue.lease(driver.shard, MODEL, "w", EPOCH, 1, 1)
        (job,) = leased.jobs
        assert await driver.queue.renew("w", [lease_of(job)]) == []
        await driver.queue.release("w", [lease_of(job)])
    finally:
        await make_room(store)
