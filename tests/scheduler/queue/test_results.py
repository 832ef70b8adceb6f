import asyncio
from dataclasses import replace

import pytest
import redis.asyncio
from reltrace_scheduler.api.terminal_results import stalled
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import QueueFullError
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.maintenance import Maintenance
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.records import Lease, NewChunk, NewJob, Progress, StoredChunk, Submission
from scheduler.driver import Driver


async def finish(driver: Driver, sizes: list[list[int]], tenant: str = "t") -> str:
    """Submit and end one job per list: each number is the size of a chunk."""
    submission = await driver.submit([NewJob("m", b"spec")] * len(sizes), tenant=tenant)
    leased = await driver.lease("w", len(sizes))
    for job, chunks in zip(leased, sizes, strict=True):
        for number, size in enumerate(chunks, 1):
            end = "SUCCEEDED" if number == len(chunks) else ""
            data = bytes([number]) * size
            chunk = NewChunk(Lease(job.job_id, job.attempt), number, end, data)
            assert await driver.commit("w", [chunk]) == [1]
    return submission.id


async def read(results: Results, submission: str, entry: int = 0, chunk: int = 0) -> list:
    return [stored async for stored in results.read(submission, entry, chunk)]


async def test_chunks_come_in_order_and_the_same_every_time(
    driver: Driver, results: Results
) -> None:
    submission = await finish(driver, [[10], [5, 5, 5], [100_000], [1]])

    everything = await read(results, submission)

    assert [(c.entry, c.data[0], len(c.data)) for c in everything] == [
        (1, 1, 10),
        (2, 1, 5),
        (2, 2, 5),
        (2, 3, 5),
        (3, 1, 100_000),
        (4, 1, 1),
    ]
    assert await read(results, submission) == everything
    positions = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]
    for skipped, (entry, chunk) in enumerate(positions):
        assert await read(results, submission, entry, chunk) == everything[skipped:]


async def test_an_unfinished_job_shows_nothing(driver: Driver, results: Results) -> None:
    submission = await driver.submit([NewJob("m", b"")])
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(Lease(job.job_id, 1), 1, "", b"half")])
    assert await read(results, submission.id) == []
    assert await results.progress(submission.id) == Progress(tenant="t", jobs=1, ended=0)


async def test_more_entries_than_a_page(driver: Driver, results: Results) -> None:
    total = [await finish(driver, [[3]] * 40) for _ in range(8)]
    assert [len(await read(results, submission)) for submission in total] == [40] * 8


async def test_acknowledging_frees_what_was_read(
    driver: Driver, results: Results, store: redis.asyncio.Redis
) -> None:
    submission = await finish(driver, [[1], [2, 2], [3]])

    assert await results.acknowledge(submission, 2) == 2
    assert await results.acknowledge(submission, 2) == 0
    assert await read(results, submission) == [StoredChunk(3, b"\1\1\1")]
    assert not await store.keys("*chunks:*")

    assert await results.acknowledge(submission, 3) == 1
    assert await results.progress(submission) is None


async def test_an_idempotency_key_of_what_was_read_is_soon_forgotten(
    driver: Driver, results: Results, store: redis.asyncio.Redis, keys: Keys
) -> None:
    submission = await driver.submit([NewJob("m", b"")], "key")
    key = keys("idempotency", "t", "key")
    assert await store.pttl(key) > 23 * 3600_000
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(Lease(job.job_id, 1), 1, "SUCCEEDED", b"a")])
    await results.acknowledge(submission.id, 1)
    assert 0 < await store.pttl(key) <= 600_000


async def test_acknowledging_early_does_not_end_a_submission(
    driver: Driver, results: Results
) -> None:
    submission = await driver.submit([NewJob("m", b"")] * 2)
    first, second = await driver.lease("w", 2)
    await driver.commit("w", [NewChunk(Lease(first.job_id, 1), 1, "SUCCEEDED", b"a")])
    await results.acknowledge(submission.id, 1)
    await driver.commit("w", [NewChunk(Lease(second.job_id, 1), 1, "SUCCEEDED", b"b")])
    assert await read(results, submission.id, 1) == [StoredChunk(2, b"b")]


async def test_the_time_to_live_starts_when_all_jobs_have_ended(
    driver: Driver, results: Results, store: redis.asyncio.Redis, settings: Settings, keys: Keys
) -> None:
    submission = await driver.submit([NewJob("m", b"")] * 2)
    first, second = await driver.lease("w", 2)
    await driver.commit("w", [NewChunk(Lease(first.job_id, 1), 1, "", b"a")])
    await driver.commit("w", [NewChunk(Lease(first.job_id, 1), 2, "SUCCEEDED", b"a")])
    assert await store.zcard(keys("expiring")) == 0

    await driver.commit("w", [NewChunk(Lease(second.job_id, 1), 1, "SUCCEEDED", b"b")])

    ((member, due),) = await store.zrange(keys("expiring"), 0, -1, withscores=True)
    seconds, _ = await store.time()
    assert member.decode() == submission.id
    assert 0 < due / 1000 - seconds <= settings.result_ttl + 1
    assert await driver.maintenance.expire() == (False, [])


async def test_what_expires_leaves_nothing(
    driver: Driver, results: Results, store: redis.asyncio.Redis, keys: Keys
) -> None:
    submission = await finish(driver, [[1], [2, 2], [70_000]])
    await results.acknowledge(submission, 1)
    await store.zadd(keys("expiring"), {submission: 1})

    assert await driver.maintenance.expire() == (False, [])

    assert await results.progress(submission) is None
    assert not await store.keys("*job:*")
    assert not await store.keys("*chunks:*")
    assert await store.zcard(keys("expiring")) == 0
    assert int(await store.hget(keys("load"), "results")) == 0


async def test_unread_results_are_counted_until_they_are_freed(
    driver: Driver, results: Results, store: redis.asyncio.Redis, keys: Keys
) -> None:
    submission = await finish(driver, [[10], [5, 5], [100_000]])
    counts = [int(await store.hget(keys("load"), "results"))]
    for entry in (1, 2, 3):
        await results.acknowledge(submission, entry)
        counts.append(int(await store.hget(keys("load"), "results")))
    assert counts == [100_020, 100_010, 100_000, 0]
    assert int(await store.hget(keys("tenant", "t"), "results")) == 0


async def test_an_unknown_submission(results: Results) -> None:
    assert await results.progress("nothing") is None
    assert await read(results, "nothing") == []


@pytest.mark.parametrize("through", [300, 10**14, 2**63, 2**64 - 1])
async def test_many_results_are_freed_in_pages_and_through_any_number(
    store: redis.asyncio.Redis, keys: Keys, settings: Settings, through: int
) -> None:
    settings = replace(settings, max_jobs=1000)
    driver = Driver.over(store, settings)
    results = driver.results
    submission = await finish(driver, [[1]] * 300)
    assert await results.acknowledge(submission, 0) == 0
    assert await results.acknowledge(submission, 200) == 200
    assert [chunk.entry for chunk in await read(results, submission)] == list(range(201, 301))
    assert await results.acknowledge(submission, through) == 100
    assert await results.progress(submission) is None
    assert not await store.keys("*job:*")


async def backpressured(driver: Driver, *, tenant: str = "t") -> str:
    """A submission of three jobs, the last of which waits until results are read."""
    submission = await driver.submit([NewJob("m", b"")] * 3, tenant=tenant)
    for _ in range(2):
        (job,) = await driver.lease("w", 1)
        await driver.commit("w", [NewChunk(Lease(job.job_id, 1), 1, "SUCCEEDED", bytes(600))])
    assert await driver.lease("w", 1) == []
    return submission.id


@pytest.fixture
def little() -> Settings:
    return Settings(lease=0.5, result_ttl=60, max_unread=1000, tenant_max_bytes=2000)


async def test_a_submission_that_waits_for_a_reader_does_not_wait_for_ever(
    store: redis.asyncio.Redis, keys: Keys, little: Settings
) -> None:
    """
    Given a submission whose jobs are backpressured because nobody reads its results
    If nobody reads for as long as results are kept
    I expect it to be handed out as abandoned, and, once its jobs have ended, to leave nothing.
    """
    driver = Driver.over(store, little)
    submission = await backpressured(driver)
    ((member, due),) = await store.zrange(keys("expiring"), 0, -1, withscores=True)
    seconds, _ = await store.time()
    assert member.decode() == submission
    assert 58 < due / 1000 - seconds <= 61
    assert await driver.maintenance.expire() == (False, [])

    await store.zadd(keys("expiring"), {submission: 1})
    assert await driver.maintenance.expire() == (False, [Submission(submission, 3)])
    await driver.queue.end([stalled(job) for job in Submission(submission, 3).job_ids])
    await driver.maintenance.expire_now(submission)
    assert await driver.maintenance.expire() == (False, [])
    assert not await store.keys("*job:*")
    assert not await store.keys("*backpressured:*")
    assert {int(n or 0) for n in await store.hmget(keys("load"), "jobs", "bytes", "results")} == {0}


async def test_whoever_reads_a_little_keeps_it(
    store: redis.asyncio.Redis, keys: Keys, little: Settings
) -> None:
    driver = Driver.over(store, little)
    submission = await backpressured(driver)
    await store.zadd(keys("expiring"), {submission: 1})
    await driver.results.acknowledge(submission, 1)
    assert await store.zcard(keys("expiring")) == 0
    assert await driver.maintenance.expire() == (False, [])
    # The backpressured job goes on.
    (job,) = await driver.lease("w", 1)
    assert job.attempt == 1


async def test_a_tenant_whose_results_nobody_reads_does_not_wait_for_ever(
    store: redis.asyncio.Redis, keys: Keys, little: Settings
) -> None:
    """
    Given a tenant whose unread results take all its room, in submissions that have not ended
    If nobody has read any for as long as results are kept
    I expect those submissions to be handed out as abandoned, once, and nobody else's.
    """
    driver = Driver.over(store, little)
    first = await backpressured(driver)
    second = await driver.submit([NewJob("m", b"")] * 2)
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(Lease(job.job_id, 1), 1, "SUCCEEDED", bytes(900))])
    mine = {first, second.id}
    other = await backpressured(driver, tenant="other")
    assert await driver.lease("w", 1) == []
    assert await store.zrange(keys("throttled_tenants"), 0, -1) == [b"t"]
    assert await driver.maintenance.stalled_submissions() == []

    await store.zadd(keys("throttled_tenants"), {"t": 1})
    found = await driver.maintenance.stalled_submissions()
    assert {one.id for one in found} == mine
    assert other not in mine
    assert await driver.maintenance.stalled_submissions() == []

    # A reader of any of them is a reader.
    assert await driver.lease("w", 1) == []
    await driver.results.acknowledge(first, 1)
    assert await store.zcard(keys("throttled_tenants")) == 0
    leased = [job.job_id for job in await driver.lease("w", 4)]
    assert set(leased) == {f"{first}-2", second.job_ids[1]}


@pytest.mark.parametrize("waits", ["for a result", "to submit"])
async def test_who_died_keeps_nobody_of_its_tenant_out_for_long(
    store: redis.asyncio.Redis, keys: Keys, little: Settings, waits: str
) -> None:
    """
    Given a tenant without room for another result, by what nobody reads
    If that lasts, and somebody of the tenant waits for room
    I expect submissions without a reader to be given up, also one that has ended, and no other.
    """
    driver = Driver.over(store, little)
    ended = await finish(driver, [[600]])
    dead = await backpressured(driver)
    one = await driver.submit([NewJob("m", b"")] * 2)
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(Lease(job.job_id, 1), 1, "SUCCEEDED", bytes(300))])
    await finish(driver, [[900]], "other")
    assert await driver.lease("w", 1) == []
    since = int(await store.zscore(keys("throttled_tenants"), "t"))

    async def found() -> set[str]:
        driver.maintenance = Maintenance(driver.shard, replace(little, reader_patience=10))
        await driver.maintenance.note_readers(driver.results.open_streams)
        return {one.id for one in await driver.maintenance.stalled_submissions()}

    # Nobody waits: there is no hurry.
    await store.zadd(keys("throttled_tenants"), {"t": since - 11_000})
    assert await found() == set()
    lost = {ended, dead}
    if waits == "to submit":
        await store.delete(keys("throttled_tenants"))
        with pytest.raises(QueueFullError):
            await driver.submit([NewJob("m", b"")])
        lost.add(one.id)
    async with driver.results.reading(one.id if waits == "for a result" else "another"):
        await store.zadd(keys("throttled_tenants"), {"t": since - 9_000}, xx=True)
        assert await found() == set()
        await store.zadd(keys("throttled_tenants"), {"t": since - 11_000}, xx=True)
        assert await found() == lost
        # Whoever comes next has as long.
        assert await found() == set()
    assert not driver.results.open_streams


async def test_streams_begin_while_readers_are_noted(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    streams = driver.results.open_streams
    streams["a"] = 1
    noting = asyncio.create_task(driver.maintenance.note_readers(name for name in streams))
    # As far as its question to Redis, which is not answered while this loop does not run.
    await asyncio.sleep(0)
    streams["b"] = 1
    await noting
    assert await store.zrange(keys("readers"), 0, -1) == [b"a"]
