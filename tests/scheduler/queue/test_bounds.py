"""What the queue keeps stays within Redis' own memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis.asyncio
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import QueueFullError
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue.connection import NodeMemory
from reltrace_scheduler.records import Lease, Limits, NewChunk, NewJob
from scheduler.driver import Driver, lease_of

MIB = 1 << 20
MEMORY = 64 * MIB


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[redis.asyncio.Redis]:
    """A Redis with little memory."""
    server = EmbeddedRedis(tmp_path, maxmemory=MEMORY)
    client = redis.asyncio.Redis.from_url(await server.start())
    yield client
    await client.aclose()
    await server.stop()


def large(count: int, size: int = MIB) -> list[NewJob]:
    return [NewJob("m", b"spec", result_bytes=size)] * count


async def numbers(store: redis.asyncio.Redis, key: str) -> dict[str, int]:
    row = await store.hgetall(key)
    return {name.decode(): int(value) for name, value in row.items() if int(value)}


async def test_bounds_are_those_of_the_settings_until_the_memory_is_smaller(
    small: redis.asyncio.Redis,
) -> None:
    given = Settings(max_bytes=2 * MIB, tenant_max_bytes=MIB, max_result_bytes=MIB)
    bounds = Driver.over(small, given).store.bounds
    await bounds.refresh()
    assert (bounds.max_bytes, bounds.tenant_max_bytes) == (2 * MIB, MIB)
    assert bounds.max_result_bytes == MIB

    bounds = Driver.over(small, Settings()).store.bounds
    await bounds.refresh()
    assert MEMORY // 4 < bounds.max_bytes <= 3 * MEMORY // 8
    assert bounds.tenant_max_bytes == bounds.max_bytes // 2
    assert bounds.max_result_bytes == MEMORY // 16
    assert bounds.results_above == MEMORY // 32
    # What fills it and is not the queue's leaves less; what the queue has is part of its bounds.
    before = bounds.max_bytes
    await small.set("other", bytes(8 * MIB))
    async with asyncio.timeout(10):
        # Redis finds out what messages still take ten times a second.
        while not before - 6 * MIB < bounds.max_bytes < before - 3 * MIB:
            await asyncio.sleep(0.02)
            await bounds.refresh()
    await small.config_set("maxmemory", 2 * MEMORY)
    await bounds.refresh()
    assert bounds.max_bytes > before + 15 * MIB


@pytest.mark.parametrize(
    ("shards", "limits", "part"),
    [(1, [64], 64), (1, [64, 64, 64], 64), (3, [64, 64, 64], 192), (4, [64, 64, 64], 128),
     (6, [64, 32, 0], 96), (1, [0], None)],
)  # fmt: skip
async def test_in_a_cluster_the_node_that_is_full_first_counts(
    store: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    limits: list[int],
    part: int | None,
) -> None:
    async def nodes(_: object) -> list[NodeMemory]:
        return [NodeMemory(used=0, buffers=0, limit=limit * MIB) for limit in limits]

    monkeypatch.setattr("reltrace_scheduler.queue.bounds.memory_of_nodes", nodes)
    settings = Settings(shards=shards)
    bounds = Driver.over(store, settings).store.bounds
    await bounds.refresh()
    expected = settings.max_bytes if part is None else part * MIB * 3 // 8
    assert bounds.max_bytes == expected


async def test_leases_reserve_room_for_their_results(
    store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a tenant with room for the results of three jobs
    I expect three leases; another for each that ends without a result, or whose result is read; and
    nothing reserved when all is over.
    """
    settings = Settings(max_bytes=100 * MIB, tenant_max_bytes=3 * MIB + 100, max_unread=MIB)
    driver = Driver.over(store, settings)
    submissions = [await driver.submit(large(1)) for _ in range(8)]
    first, second, third = await driver.lease("w", 8)
    assert await driver.lease("w", 8) == []
    assert (await numbers(store, keys("load")))["reserved"] == 3 * MIB
    # It waits for its own leases, not for its reader.
    assert await store.zcard(keys("throttled_tenants")) == 0

    await driver.queue.release("w", [lease_of(first)])
    (again,) = await driver.lease("w", 8)
    await driver.queue.retry("w", [lease_of(second)])
    (fourth,) = await driver.lease("v", 8)
    chunk = bytes(MIB - 100)
    for job in (again, third):
        assert await driver.commit("w", [NewChunk(lease_of(job), 1, "SUCCEEDED", chunk)]) == [1]
    assert await driver.lease("w", 8) == []
    assert await store.zrange(keys("throttled_tenants"), 0, -1) == [b"t"]
    held = await numbers(store, keys("tenant", "t"))
    assert (held["results"], held["reserved"]) == (2 * len(chunk), MIB)

    await driver.results.acknowledge(third.job_id.rpartition("-")[0], 1)
    assert await store.zcard(keys("throttled_tenants")) == 0
    (fifth,) = await driver.lease("w", 8)
    for job, worker in ((fourth, "v"), (fifth, "w")):
        assert await driver.commit(worker, [NewChunk(lease_of(job), 1, "FAILED", b"x")]) == [1]
    left = {submission.id for submission in submissions}
    await driver.results.acknowledge(again.job_id.rpartition("-")[0], 1)
    leased = await driver.lease("w", 8)
    assert len(leased) == 3
    assert {job.job_id.rpartition("-")[0] for job in leased} <= left
    for job in leased:
        await driver.commit("w", [NewChunk(lease_of(job), 1, "FAILED", b"x")])
    assert "reserved" not in await numbers(store, keys("load"))
    assert "reserved" not in await numbers(store, keys("tenant", "t"))


async def test_a_lost_lease_reserves_nothing(store: redis.asyncio.Redis, keys: Keys) -> None:
    driver = Driver.over(store, Settings(lease=0.5))
    await driver.submit(large(2))
    await driver.lease("w", 2)
    await driver.reap_until(requeued=2)
    assert "reserved" not in await numbers(store, keys("load"))


async def test_what_an_older_scheduler_leaves_reserved_is_given_up(
    store: redis.asyncio.Redis, keys: Keys
) -> None:
    driver = Driver.over(store, Settings())
    await driver.submit(large(2))
    first, second = await driver.lease("w", 2)
    # It ends a lease without giving up its reservation.
    await store.hdel(keys("job", first.job_id), "reserved")
    for job in (first, second):
        assert (await numbers(store, keys("tenant", "t")))["reserved"] >= MIB
        await driver.store.tenants.forget_idle()
        await driver.commit("w", [NewChunk(lease_of(job), 1, "FAILED", b"x")])
    assert (await numbers(store, keys("load")))["reserved"] == MIB
    await driver.store.tenants.forget_idle()
    assert "reserved" not in await numbers(store, keys("load"))
    assert "reserved" not in await numbers(store, keys("tenant", "t"))


async def test_what_an_older_scheduler_leaves_reserved_keeps_nobody_waiting(
    store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a tenant with room for the results of three jobs, and jobs that wait
    If an older scheduler ends three leases without giving up what they reserved
    I expect the next to be leased all the same: nothing is, so that nothing can be reserved.
    """
    settings = Settings(max_bytes=100 * MIB, tenant_max_bytes=3 * MIB + 100, max_unread=MIB)
    driver = Driver.over(store, settings)
    for _ in range(5):
        await driver.submit(large(1))
    for job in await driver.lease("w", 8):
        await store.hdel(keys("job", job.job_id), "reserved")
        await driver.commit("w", [NewChunk(lease_of(job), 1, "FAILED", b"x")])
    assert await driver.lease("w", 8) == []
    await driver.store.tenants.forget_idle()
    (fourth, fifth) = await driver.lease("w", 8)
    # What is leased keeps its room.
    await driver.store.tenants.forget_idle()
    assert (await numbers(store, keys("tenant", "t")))["reserved"] == 2 * MIB
    for job in (fourth, fifth):
        await driver.commit("w", [NewChunk(lease_of(job), 1, "FAILED", b"x")])
    assert "reserved" not in await numbers(store, keys("load"))


async def test_what_may_be_large_runs_beside_a_little_that_is_unread(
    store: redis.asyncio.Redis,
) -> None:
    """
    Given a tenant whose bound is smaller than what its jobs may give
    I expect them to run one by one although a little is unread, and none while much of it is.
    """
    driver = Driver.over(store, Settings(tenant_max_bytes=2 * MIB))
    await driver.submit([NewJob("m", b"spec")])
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(lease_of(job), 1, "SUCCEEDED", b"unread")])
    submission = await driver.submit(large(3, 3 * MIB))
    (first,) = await driver.lease("w", 3)
    chunk = NewChunk(lease_of(first), 1, "SUCCEEDED", bytes(3 * MIB // 2), b"-")
    assert await driver.commit("w", [chunk]) == [1]
    assert await driver.lease("w", 3) == []
    await driver.results.acknowledge(submission.id, 1)
    assert len(await driver.lease("w", 3)) == 1


async def test_whoever_reads_goes_on_when_others_fill_the_queue(
    store: redis.asyncio.Redis,
) -> None:
    """
    Given tenants that do not read, with as many unread results as all may have
    I expect one that has none to be leased jobs, as far as the reserve goes and no further.
    """
    driver = Driver.over(store, Settings(max_bytes=8 * MIB, tenant_max_bytes=4 * MIB))
    for tenant in ("a", "b"):
        await driver.submit(large(8), tenant=tenant)
    leased = await driver.lease("w", 16)
    assert len(leased) == 8
    for job in leased:
        data = bytes(MIB - 100)
        await driver.commit("w", [NewChunk(lease_of(job), 1, "SUCCEEDED", data)])
    assert await driver.lease("w", 16) == []
    with pytest.raises(QueueFullError):
        await driver.submit(large(100), tenant="a")
    await driver.submit(large(8), tenant="reader")
    found = await driver.lease("w", 16)
    assert {job.queue.tenant for job in found} == {"reader"}
    assert len(found) == 2


async def test_a_result_past_the_bound_fails_and_is_freed_at_once(
    store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a worker that sends more than one result may have
    I expect the job to end FAILED with the first chunk too many, nothing of the result to be
    stored, and what follows to be refused; while chunks that are sent again pass no bound.
    """
    driver = Driver.over(store, Settings(max_result_bytes=3 * MIB))
    submission = await driver.submit(large(2))
    job, other = await driver.lease("w", 2)

    def chunk(number: int, end: str = "", of: Lease | None = None) -> NewChunk:
        return NewChunk(of or lease_of(job), number, end, bytes(MIB), b"too large")

    assert await driver.commit("w", [chunk(1), chunk(2), chunk(3)]) == [1, 1, 1]
    # The answer was lost.
    assert await driver.commit("w", [chunk(2), chunk(3)]) == [1, 1]
    assert await driver.commit("w", [chunk(4), chunk(5)]) == [2, 1]
    assert await driver.commit("w", [chunk(4), chunk(6, "SUCCEEDED")]) == [1, 0]
    assert not await store.keys("*chunks*")
    load = await numbers(store, keys("load"))
    assert load["results"] == len(b"too large")
    assert load["jobs"] == 1
    (stored,) = [one async for one in driver.results.read(submission.id, 0, 0)]
    assert stored.data == b"too large"
    (record,) = await driver.queue.jobs([job.job_id], tenant="t")
    assert record is not None
    assert record.state == "FAILED"
    # A tenant's own bound holds for one result too.
    await driver.store.tenants.set("t", Limits(max_bytes=MIB))
    ends = lease_of(other)
    assert await driver.commit("w", [chunk(1, of=ends), chunk(2, "SUCCEEDED", ends)]) == [1, 2]


async def test_specifications_leave_room_for_results(small: redis.asyncio.Redis) -> None:
    """A queue that is full of specifications is worked off all the same."""
    driver = Driver.over(small, Settings())
    await driver.store.bounds.refresh()
    spec = bytes(MIB)
    submissions = []
    with suppress(QueueFullError):
        while len(submissions) < 64:
            new = [NewJob("m", spec, result_bytes=MIB)]
            submissions.append(await driver.submit(new, tenant=f"t{len(submissions) % 8}"))
    assert 10 < len(submissions) < 64
    left = {one.id for one in submissions}
    while left:
        leased = await driver.lease("w", 1)
        assert leased
        for job in leased:
            done = [NewChunk(lease_of(job), 1, "SUCCEEDED", bytes(MIB))]
            assert await driver.commit("w", done) == [1]
            left.discard(job.job_id.rpartition("-")[0])
        async with asyncio.timeout(10):
            for job in leased:
                await driver.results.acknowledge(job.job_id.rpartition("-")[0], 1)
        await driver.reap()
