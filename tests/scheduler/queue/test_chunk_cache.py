"""Large results that a reader waits for: given from memory, and never others than Redis has."""

import pytest
import redis.asyncio
from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue import chunk_cache
from reltrace_scheduler.queue.chunk_cache import ChunkCache, ChunkName
from reltrace_scheduler.records import Lease, NewChunk
from scheduler.driver import Driver, jobs, lease_of


def chunk(number: int, data: bytes, job: str = "s-0", attempt: int = 1, end: str = "") -> NewChunk:
    return NewChunk(Lease(job, attempt), number, end, data)


async def commit(driver: Driver, worker: str, *chunks: NewChunk) -> None:
    """Store chunks, as a worker's session does."""
    assert await driver.commit(worker, chunks) == [1] * len(chunks)
    for each in chunks:
        driver.results.note_stored(worker, each)


async def read(driver: Driver, submission: str, after_chunk: int = 0) -> list[bytes]:
    return [chunk.data async for chunk in driver.results.read(submission, 0, after_chunk)]


async def read_back(store: redis.asyncio.Redis) -> int:
    """Return how many chunks were asked of Redis so far."""
    return int((await store.info("commandstats")).get("cmdstat_lindex", {}).get("calls", 0))


async def test_what_a_reader_waits_for_is_not_read_back(
    driver: Driver, store: redis.asyncio.Redis
) -> None:
    """
    Given a reader, and a result of eight chunks
    I expect all of them from memory, once; and from Redis for whoever reads them again.
    """
    submission = await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    sent = [bytes([number]) * 100_000 for number in range(8)]
    before = await read_back(store)
    async with driver.results.reading(submission.id):
        for number, data in enumerate(sent, 1):
            end = "SUCCEEDED" if number == len(sent) else ""
            await commit(driver, "w", NewChunk(lease_of(job), number, end, data))
        assert await read(driver, submission.id, 2) == sent[2:]
        # That there is no ninth.
        assert await read_back(store) == before + 1
        assert await read(driver, submission.id) == sent
        # The first two are still in memory.
        assert await read_back(store) == before + 1 + 6 + 1


async def test_nothing_is_kept_without_a_reader(driver: Driver, store: redis.asyncio.Redis) -> None:
    """
    Given two chunks that came before their reader, or whose reader has left
    I expect them to be read from Redis.
    """
    submission = await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    before = await read_back(store)
    await commit(driver, "w", NewChunk(lease_of(job), 1, "", b"first"))
    async with driver.results.reading(submission.id):
        await commit(driver, "w", NewChunk(lease_of(job), 2, "SUCCEEDED", b"second"))
    assert await read(driver, submission.id) == [b"first", b"second"]
    assert await read_back(store) == before + 3


async def test_an_attempt_that_redis_gave_twice(
    driver: Driver, store: redis.asyncio.Redis, settings: Settings
) -> None:
    """
    Given a Redis that lost its last second, with a chunk of a job's first attempt in it
    If another worker is leased that attempt, and ends it over another scheduler
    I expect the reader at the first scheduler to get nothing of the first worker's.
    """
    elsewhere = Driver.over(store, settings)
    submission = await driver.submit(jobs(1))
    (job,) = await driver.lease("w1", 1)
    async with driver.results.reading(submission.id):
        await commit(driver, "w1", NewChunk(lease_of(job), 1, "", b"lost"))
        (chunks,) = await store.keys("*:chunks:*")
        await store.delete(chunks)
        await store.hset(driver.shard.key("job", job.job_id), "worker", "w2")
        await commit(elsewhere, "w2", NewChunk(lease_of(job), 1, "", b"found"))
        await commit(elsewhere, "w2", NewChunk(lease_of(job), 2, "SUCCEEDED", b"end"))
        assert await read(driver, submission.id) == [b"found", b"end"]


async def test_an_attempt_that_was_lost(driver: Driver) -> None:
    """
    Given a chunk of an attempt whose lease is released
    I expect the result to be that of the next attempt.
    """
    submission = await driver.submit(jobs(1))
    (job,) = await driver.lease("w1", 1)
    async with driver.results.reading(submission.id):
        await commit(driver, "w1", NewChunk(lease_of(job), 1, "", b"old"))
        await driver.queue.release("w1", [lease_of(job)])
        (again,) = await driver.lease("w1", 1)
        await commit(driver, "w1", NewChunk(lease_of(again), 1, "", b"new"))
        await commit(driver, "w1", NewChunk(lease_of(again), 2, "SUCCEEDED", b"end"))
        assert await read(driver, submission.id) == [b"new", b"end"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Given chunks that nobody takes
    I expect the first of them to be kept, up to the bound, until they are old.
    """
    monkeypatch.setattr(chunk_cache, "_MAX_BYTES", 100)
    cache = ChunkCache()
    for number in range(1, 5):
        cache.add("w", chunk(number, bytes(40)))
    # Sent again: it counts once.
    cache.add("w", chunk(1, bytes(40)))
    found = [cache.take(ChunkName("s-0", 1, "w", number)) for number in range(1, 5)]
    assert found == [bytes(40), bytes(40), None, None]
    cache.add("w", chunk(5, bytes(100)))
    cache.add("w", chunk(6, bytes(1), job="t-0"))
    monkeypatch.setattr(chunk_cache, "_MAX_AGE", -1)
    cache.add("w", chunk(7, bytes(60), job="t-0"))
    monkeypatch.undo()
    assert cache.take(ChunkName("s-0", 1, "w", 5)) is None
    assert cache.take(ChunkName("t-0", 1, "w", 7)) == bytes(60)


def test_what_is_old_or_dropped_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ChunkCache()
    cache.add("w", chunk(1, b"1"))
    cache.add("w", chunk(1, b"2", job="t-0"))
    cache.drop("s")
    assert cache.take(ChunkName("s-0", 1, "w", 1)) is None
    monkeypatch.setattr(chunk_cache, "_MAX_AGE", -1)
    assert cache.take(ChunkName("t-0", 1, "w", 1)) is None
