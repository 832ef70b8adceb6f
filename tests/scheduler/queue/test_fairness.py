from collections import Counter

import pytest
import redis.asyncio
from reltrace_scheduler.api.terminal_results import cancelled
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import ForbiddenError, QueueFullError, TooLargeError
from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.queue.tenants import Tenants
from reltrace_scheduler.records import LeasedJob, Limits, NewChunk, NewJob, Priority
from scheduler.driver import Driver, end, jobs, lease_of


@pytest.fixture
def settings() -> Settings:
    return Settings(
        lease=30, max_jobs=5000, tenant_max_jobs=2000, max_unread=1000, tenant_max_bytes=100_000
    )


@pytest.fixture
def tenants(driver: Driver) -> Tenants:
    return driver.store.tenants


def owner(job: LeasedJob) -> str:
    return job.spec.split()[0].decode()


async def served(driver: Driver, count: int, at_once: int) -> list[LeasedJob]:
    """Lease and finish jobs, some at a time."""
    done: list[LeasedJob] = []
    while len(done) < count:
        leased = await driver.lease("w", at_once)
        assert leased, "jobs wait, and none is leased"
        await driver.commit("w", [end(job, b"") for job in leased])
        done += leased
    return done[:count]


@pytest.mark.parametrize("at_once", [1, 7, 64])
async def test_tenants_share_alike_however_much_they_queue(driver: Driver, at_once: int) -> None:
    await driver.submit(jobs(1000, "greedy"), tenant="greedy")
    await driver.submit(jobs(100, "modest"), tenant="modest")

    shares = Counter(owner(job) for job in await served(driver, 160, at_once))

    assert shares["modest"] == pytest.approx(80, abs=max(16, at_once / 2))


@pytest.mark.parametrize("at_once", [1, 16])
async def test_weights_set_the_shares(driver: Driver, tenants: Tenants, at_once: int) -> None:
    await tenants.set("heavy", Limits(weight=3))
    for tenant in ("heavy", "light"):
        await driver.submit(jobs(600, tenant), tenant=tenant)

    shares = Counter(owner(job) for job in await served(driver, 400, at_once))

    assert shares["heavy"] == pytest.approx(300, abs=20)


async def test_shares_are_of_bytes_not_of_jobs(driver: Driver) -> None:
    await driver.submit([NewJob("m", b"long " + bytes(95))] * 90, tenant="long")
    await driver.submit([NewJob("m", b"short" + b" " * 5)] * 900, tenant="short")

    shares = Counter(owner(job) for job in await served(driver, 440, 4))

    assert shares["short"] / shares["long"] == pytest.approx(10, rel=0.2)


async def test_having_been_away_is_no_merit(driver: Driver) -> None:
    await driver.submit(jobs(1000, "busy"), tenant="busy")
    await served(driver, 500, 16)
    await driver.submit(jobs(400, "back"), tenant="back")

    shares = Counter(owner(job) for job in await served(driver, 200, 16))

    assert shares["back"] == pytest.approx(100, abs=16)


async def test_interactive_goes_first_and_batch_does_not_starve(driver: Driver) -> None:
    await driver.submit(jobs(1000, "batch"), priority=Priority.BATCH)
    await driver.submit(jobs(1000, "interactive"))
    for at_once in (1, 3, 10, 64):
        shares = Counter(job.queue.queue_class for job in await served(driver, 192, at_once))
        assert shares["batch"] == pytest.approx(19, abs=2), at_once


async def test_batch_takes_all_when_nobody_waits(driver: Driver) -> None:
    await driver.submit(jobs(30, "batch"), priority=Priority.BATCH)
    assert len(await driver.lease("w", 30)) == 30


async def test_room_is_kept_for_interactive_jobs(driver: Driver) -> None:
    await driver.submit(jobs(30, "batch"), priority=Priority.BATCH)
    assert len(await driver.lease("w", 20, most_batch=15)) == 15
    assert await driver.lease("w", 5, most_batch=0) == []
    await driver.submit(jobs(3))
    assert len(await driver.lease("w", 5, most_batch=0)) == 3


async def test_a_tenants_own_bounds(driver: Driver, tenants: Tenants) -> None:
    await tenants.set("small", Limits(max_jobs=5))
    with pytest.raises(TooLargeError, match=r"of the tenant.* 5 jobs"):
        await driver.submit(jobs(6), tenant="small")
    await driver.submit(jobs(5), tenant="small")
    with pytest.raises(QueueFullError, match="holds 5 jobs"):
        await driver.submit(jobs(1), tenant="small")
    # Others have the default.
    await driver.submit(jobs(6), tenant="other")
    with pytest.raises(TooLargeError, match="100000 bytes"):
        await driver.submit([NewJob("m", bytes(100_001))], tenant="other")
    await tenants.set("closed", Limits(max_jobs=0))
    with pytest.raises(ForbiddenError, match="of the tenant takes no jobs"):
        await driver.submit(jobs(1), tenant="closed")


async def test_settings_of_a_tenant(driver: Driver, tenants: Tenants) -> None:
    await driver.submit(jobs(2), tenant="a")
    await tenants.set("b", Limits(weight=2.5, max_jobs=7))
    await tenants.set("b", Limits(max_bytes=100))
    a, b = await tenants.all()
    assert (a.tenant, a.limits, a.jobs, a.bytes) == ("a", Limits(), 2, 12)
    assert b.limits == Limits(2.5, 7, 100)


async def test_a_submission_nobody_reads_waits_and_goes_on(
    driver: Driver, results: Results
) -> None:
    unread = await driver.submit(jobs(40, "unread"))
    first = await driver.lease("w", 2)
    await driver.commit("w", [end(job, bytes(600)) for job in first])
    other = await driver.submit(jobs(3, "other"))

    # 1,200 bytes are unread, the bound is 1,000: only the other submission's are leased.
    leased = await driver.lease("w", 50)
    assert {job.job_id for job in leased} == set(other.job_ids)
    assert await driver.lease("w", 50) == []

    await results.acknowledge(unread.id, 1)
    assert len(await driver.lease("w", 50)) == 38


async def test_backpressured_jobs_can_be_ended(driver: Driver, store: redis.asyncio.Redis) -> None:
    submission = await driver.submit(jobs(3))
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [end(job, bytes(2000))])
    assert await driver.lease("w", 5) == []
    ended = await driver.queue.end([cancelled(job_id) for job_id in submission.job_ids])
    assert ended == [None, *[QueueName("interactive", "t", "m")] * 2]
    assert not await store.keys("*backpressured:*")


async def test_a_tenant_that_reads_nothing_slows_only_itself(
    driver: Driver, results: Results, tenants: Tenants
) -> None:
    await tenants.set("full", Limits(max_bytes=10_000))
    full = [await driver.submit(jobs(2, f"full{n}"), tenant="full") for n in range(12)]
    for job in await driver.lease("w", 12):
        await driver.commit("w", [end(job, bytes(900))])
    await driver.submit(jobs(2, "reader"), tenant="reader")

    assert {owner(job) for job in await driver.lease("w", 50)} == {"reader"}

    for submission in full:
        await results.acknowledge(submission.id, 2)
    assert len(await driver.lease("w", 50)) == 12


async def test_results_past_the_bound_in_all_stop_those_who_hold_them(
    store: redis.asyncio.Redis,
) -> None:
    settings = Settings(max_bytes=1000)
    driver = Driver.over(store, settings)
    await driver.submit(jobs(2), tenant="holder")
    (job,) = await driver.lease("w", 1)
    await driver.submit(jobs(1), tenant="new")
    await driver.commit("w", [NewChunk(lease_of(job), 1, "SUCCEEDED", bytes(1000))])
    (leased,) = await driver.lease("w", 5)
    assert leased.job_id != job.job_id
    assert (await driver.queue.jobs([leased.job_id], tenant="new"))[0] is not None


async def test_workers_share_what_waits(driver: Driver) -> None:
    """
    Given 100 jobs and two workers with room for all of them
    I expect 50 for each, and more for one of them as it ends some.
    """
    await driver.submit(jobs(60, "a"), tenant="a")
    await driver.submit(jobs(40, "b"), tenant="b", priority=Priority.BATCH)

    first = await driver.lease("w1", 256, workers=2)
    assert len(first) == 50
    assert await driver.lease("w1", 256, workers=2) == []
    assert len(await driver.lease("w2", 256, workers=2)) == 50

    await driver.submit(jobs(60, "a"), tenant="a")
    await driver.commit("w1", [end(job, b"") for job in first])
    assert len(await driver.lease("w1", 256, workers=2)) > 30


async def test_few_jobs_are_spread_over_many_workers(driver: Driver) -> None:
    await driver.submit(jobs(20))
    assert len(await driver.lease("w1", 256, workers=8)) == 3
    assert len(await driver.lease("w2", 256, workers=500)) == 2


async def test_a_worker_that_is_left_alone_gets_the_rest(driver: Driver) -> None:
    await driver.submit(jobs(100))
    assert len(await driver.lease("w1", 256, workers=2)) == 50
    assert len(await driver.lease("w1", 256, workers=1)) == 50


@pytest.mark.parametrize("waiting", [1, 3, 15, 16, 40])
async def test_whoever_keeps_its_queue_nearly_empty_gains_nothing_by_it(
    driver: Driver, waiting: int
) -> None:
    """
    Given a tenant with a backlog, and one that hands in a job for every job that is taken
    I expect half of the jobs to be each one's.
    """
    await driver.submit(jobs(400, "steady"), tenant="steady")
    await driver.submit(jobs(waiting, "quick"), tenant="quick")
    shares: Counter[str] = Counter()
    while shares.total() < 320:
        leased = await driver.lease("w", 32)
        assert leased
        await driver.commit("w", [end(job, b"") for job in leased])
        taken = Counter(owner(job) for job in leased)
        shares += taken
        if taken["quick"]:
            await driver.submit(jobs(taken["quick"], "quick"), tenant="quick")
    fair = min(160, 10 * waiting)
    assert shares["quick"] == pytest.approx(fair, abs=40)
    assert shares["steady"] >= 120


async def test_virtual_times_of_tenants_without_jobs_are_forgotten(
    driver: Driver, store: redis.asyncio.Redis
) -> None:
    for tenant in ("a", "b", "c"):
        await driver.submit(jobs(5, tenant), tenant=tenant)
    while leased := await driver.lease("w", 4):
        await driver.commit("w", [end(job, b"") for job in leased])
    assert not await store.keys("*vt_idle:*")
    assert not await store.keys("*vt_active:*")
