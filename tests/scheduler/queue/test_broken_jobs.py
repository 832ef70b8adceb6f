"""A job whose submission is gone is removed whole by whatever finds it, and harms no other job."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import redis.asyncio
from reltrace_scheduler.api.terminal_results import cancelled, overdue, quarantined
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import GROUP, Keys
from reltrace_scheduler.records import Lease, LeasedJob, NewChunk, NewJob, QuarantineCandidate
from scheduler.driver import MODEL, Driver, jobs, lease_of

WORKER = "w"


async def queued(driver: Driver) -> list[LeasedJob]:
    return []


async def leased(driver: Driver) -> list[LeasedJob]:
    """Leased, with a first chunk stored and a draft."""
    held = await driver.lease(WORKER, 10)
    await driver.commit(WORKER, [NewChunk(lease_of(job), 1, "", b"chunk") for job in held])
    await driver.results.write_drafts(WORKER, [(lease_of(job), b"draft") for job in held])
    return held


async def delayed(driver: Driver) -> list[LeasedJob]:
    held = await driver.lease(WORKER, 10)
    await driver.queue.retry(WORKER, [lease_of(job) for job in held])
    return held


async def ended(driver: Driver) -> list[LeasedJob]:
    """The first of two has ended, and its result waits."""
    held = await driver.lease(WORKER, 10)
    bad = [job for job in held if job.spec.startswith(b"bad")]
    await driver.commit(WORKER, [NewChunk(lease_of(bad[0]), 1, "SUCCEEDED", b"result")])
    return held


async def reap(driver: Driver, held: list[LeasedJob]) -> None:
    # One lease that is not of a broken job shows that this went on behind those.
    await driver.reap_until(requeued=1)
    # All leases are of one moment, but the queues are looked at one after the other.
    await driver.reap()


async def end(driver: Driver, held: list[LeasedJob]) -> None:
    timed = await driver.store.redis.zrange("reltrace:{0}:deadlines", 0, -1)
    await driver.queue.end([overdue(job_id.decode()) for job_id in timed])


async def quarantine(driver: Driver, held: list[LeasedJob]) -> None:
    bad = [job for job in held if job.spec.startswith(b"bad")]
    candidates = [QuarantineCandidate(job.job_id, job.attempt, ()) for job in bad]
    await driver.queue.end([quarantined(candidate) for candidate in candidates])


async def commit(driver: Driver, held: list[LeasedJob]) -> None:
    chunks = [NewChunk(lease_of(job), 2, "SUCCEEDED", b"last") for job in held]
    outcome = await driver.commit(WORKER, chunks)
    assert outcome == [int(job.spec.startswith(b"good")) for job in held]


async def renew(driver: Driver, held: list[LeasedJob]) -> None:
    lost = await driver.queue.renew(WORKER, [lease_of(job) for job in held])
    assert lost == [lease_of(job) for job in held if job.spec.startswith(b"bad")]


async def release(driver: Driver, held: list[LeasedJob]) -> None:
    await driver.queue.release(WORKER, [lease_of(job) for job in held])


async def retry(driver: Driver, held: list[LeasedJob]) -> None:
    await driver.queue.retry(WORKER, [lease_of(job) for job in held])


async def reconcile(driver: Driver, held: list[LeasedJob]) -> None:
    assert await driver.queue.reconcile(WORKER, []) == 1


async def draft(driver: Driver, held: list[LeasedJob]) -> None:
    await driver.results.write_drafts(WORKER, [(lease_of(job), b"draft") for job in held])


async def lease(driver: Driver, held: list[LeasedJob]) -> None:
    assert [job.spec for job in await driver.lease(WORKER, 10)] == [b"good 0"]


async def promote(driver: Driver, held: list[LeasedJob]) -> None:
    for name in await driver.store.redis.zrange("reltrace:{0}:delayed", 0, -1):
        await driver.store.redis.zadd("reltrace:{0}:delayed", {name: 1})
    await driver.maintenance.promote()


Step = Callable[[Driver, list[LeasedJob]], Awaitable[None]]
FOUND: list[tuple[Callable[[Driver], Awaitable[list[LeasedJob]]], Step]] = [
    (queued, lease), (queued, end), (delayed, promote), (delayed, end),
    (leased, reap), (leased, end), (leased, quarantine), (leased, commit), (leased, renew),
    (leased, release), (leased, retry), (leased, reconcile), (leased, draft), (ended, end),
]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "step"), FOUND, ids=[f"{s.__name__}-{f.__name__}" for s, f in FOUND]
)
@pytest.mark.parametrize("left", ["nothing", "a part"])
async def test_it_leaves_nothing(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys, state, step: Step, left: str
) -> None:
    """
    Given jobs, queued or leased or waiting, whose submission is gone from Redis
    If a script comes upon them
    I expect them to be gone with their leases, deadlines and bytes, and another job to be well.
    """
    timed = [NewJob(MODEL, f"bad {n}".encode(), timeout=1000) for n in range(2)]
    bad = await driver.submit(timed, tenant="bad")
    good = await driver.submit([NewJob(MODEL, b"good 0")], tenant="good")
    held = await state(driver)
    name = keys("submission", bad.id)
    if left == "nothing":
        await store.delete(name)
    else:
        await store.hdel(name, "tenant", "ended")

    await step(driver, held)

    while (await driver.maintenance.expire())[0]:
        pass
    assert not [key for key in await store.keys() if bad.id in key.decode()]
    for index in ("deadlines", "delayed", "expiring"):
        members = await store.zrange(keys(index), 0, -1)
        assert not [member for member in members if bad.id in member.decode()], index
    if await store.exists(keys("queue", "interactive:bad:m")):
        assert await store.xlen(keys("queue", "interactive:bad:m")) == 0
        pending = await store.xpending(keys("queue", "interactive:bad:m"), GROUP)
        assert pending["pending"] == 0
    assert not [job for job in await store.smembers(keys("held", WORKER)) if bad.id in str(job)]
    counts = await store.hmget(keys("tenant", "bad"), "jobs", "bytes", "results")
    assert {int(count or 0) for count in counts} == {0}
    # The other job can still be ended, and nothing is counted that is not there.
    await driver.queue.end([cancelled(good.job_ids[0])])
    counts = await store.hmget(keys("load"), "jobs", "bytes")
    assert {int(count or 0) for count in counts} == {0}


async def test_backpressured_jobs_go_with_their_submission(
    store: redis.asyncio.Redis, settings: Settings, keys: Keys
) -> None:
    driver = Driver.over(store, replace(settings, max_unread=10))
    submission = await driver.submit(jobs(3))
    (first,) = await driver.lease(WORKER, 1)
    await driver.commit(WORKER, [NewChunk(lease_of(first), 1, "SUCCEEDED", bytes(20))])
    assert await driver.lease(WORKER, 10) == []
    assert await store.llen(keys("backpressured", submission.id)) == 2
    await store.delete(keys("submission", submission.id))
    await store.zadd(keys("expiring"), {submission.id: 1})

    await driver.maintenance.expire()

    assert not [key for key in await store.keys() if submission.id in key.decode()]
    assert {int(n or 0) for n in await store.hmget(keys("load"), "jobs", "bytes", "results")} == {0}


async def test_a_deadline_of_a_job_that_is_gone_is_forgotten(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await store.zadd(keys("deadlines"), {"gone-0": 1})
    assert await driver.maintenance.overdue() == ["gone-0"]
    assert await driver.queue.end([overdue("gone-0")]) == [None]
    assert await driver.maintenance.overdue() == []


async def test_a_queue_that_is_gone_is_made_again(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await driver.submit(jobs(1))
    await driver.enter(WORKER)
    await store.delete(keys("queue", "interactive:t:m"))
    await driver.store.registry.forget(WORKER)
    await driver.submit(jobs(1, "next"))
    assert [job.spec for job in await driver.lease(WORKER, 10)] == [b"next 0"]


async def test_results_expire_a_part_at_a_time(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys, settings: Settings
) -> None:
    """
    Given an expired submission with more results than one script frees
    I expect it to be unknown at once, so that nobody reads a part of it, and all to be freed.
    """
    driver = Driver.over(store, replace(settings, max_jobs=1000))
    submission = await driver.submit(jobs(300))
    held = await driver.lease(WORKER, 300)
    while len(held) < 300:
        held += await driver.lease(WORKER, 300)
    chunks = [
        part
        for job in held
        for part in (
            [NewChunk(lease_of(job), 1, "SUCCEEDED", b"small")]
            if job.spec.endswith(b"0")
            else [
                NewChunk(Lease(job.job_id, 1), n, end, b"x") for n, end in ((1, ""), (2, "FAILED"))
            ]
        )
    ]
    await driver.commit(WORKER, chunks)
    await store.zadd(keys("expiring"), {submission.id: 1})

    assert await driver.maintenance.expire() == (True, [])
    assert await driver.results.progress(submission.id) is None
    assert 0 < await store.xlen(keys("results", submission.id)) < 300
    while (await driver.maintenance.expire())[0]:
        pass
    assert not [key for key in await store.keys() if submission.id in key.decode()]
    assert int(await store.hget(keys("load"), "results")) == 0


async def test_a_job_whose_record_is_gone(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a submission of two queued jobs, one of whose records is gone from Redis
    If a worker is leased jobs
    I expect the submission to be unknown from then on, so that its reader does not wait for ever,
    and nothing of it to be left; another one is well.
    """
    bad = await driver.submit([NewJob(MODEL, f"bad {n}".encode()) for n in range(2)], tenant="bad")
    await driver.submit([NewJob(MODEL, b"good 0")], tenant="good")
    await store.delete(keys("job", f"{bad.id}-0"))

    specs = [job.spec for _ in range(2) for job in await driver.lease(WORKER, 10)]

    assert b"good 0" in specs
    assert await driver.results.progress(bad.id) is None
    await driver.queue.end([cancelled(f"{bad.id}-1")])
    while (await driver.maintenance.expire())[0]:
        pass
    assert not [key for key in await store.keys() if bad.id in key.decode()]
    assert await store.hget(keys("tenant", "bad"), "jobs") == b"0"
