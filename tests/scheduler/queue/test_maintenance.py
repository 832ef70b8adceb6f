import asyncio
from dataclasses import replace

import redis.asyncio
from reltrace_scheduler.api.terminal_results import cancelled, quarantined
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys, QueueName
from reltrace_scheduler.queue.job_queue import LOST
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.records import Lease, NewChunk, NewJob, TerminalResult
from scheduler.driver import Driver, end, jobs, lease_of

QUEUE = QueueName("interactive", "t", "m")


async def lose(driver: Driver, worker: str, count: int = 1) -> list:
    """Lease jobs to a worker that falls silent."""
    leased = await driver.lease(worker, count)
    await driver.reap_until(requeued=len(leased))
    return leased


async def test_the_third_lost_lease_quarantines_a_job(driver: Driver) -> None:
    await driver.submit(jobs(1))
    for attempt in (1, 2):
        (job,) = await driver.lease(f"w{attempt}", 1)
        assert job.attempt == attempt
        await driver.reap_until(requeued=1)
    (job,) = await driver.lease("w3", 1)

    (candidate,) = await driver.reap_until(candidates=1)

    assert (candidate.job_id, candidate.attempt) == (job.job_id, 3)
    assert [(x.attempt, x.worker) for x in candidate.lost] == [(1, "w1"), (2, "w2"), (3, "w3")]
    assert candidate.lost[0].lost_at < candidate.lost[2].lost_at
    assert await driver.commit("w3", [end(job)]) == [LOST]

    # If the reaper dies before it has written the end, the next one finds the job again.
    (again,) = await driver.reap_until(candidates=1)
    assert again == candidate
    assert await driver.queue.end([quarantined(candidate)]) == [
        QueueName("isolate_single", "t", "m")
    ]
    assert await driver.queue.end([quarantined(candidate)]) == [None]
    (record,) = await driver.queue.jobs([job.job_id], tenant="t")
    assert record is not None
    assert record.state == "QUARANTINED"
    assert await driver.queue.ended() == {"QUARANTINED": 1}


async def test_a_quarantined_job_can_be_looked_at(driver: Driver) -> None:
    await driver.submit([NewJob("m", b"deadly")])
    for worker in ("a", "b"):
        await lose(driver, worker)
    await driver.lease("c", 1)
    (candidate,) = await driver.reap_until(candidates=1)
    await driver.queue.end([quarantined(candidate)])

    (job,) = await driver.store.quarantine.latest(10)

    assert (job.tenant, job.spec, job.lost) == ("t", b"deadly", candidate.lost)
    await driver.store.quarantine.forget(job.job_id)
    assert await driver.store.quarantine.latest(10) == []


async def test_what_was_leased_beside_a_deadly_job_survives(driver: Driver) -> None:
    """Every worker that holds the deadly job falls silent, with all that it holds."""
    await driver.submit([NewJob("m", b"deadly"), *jobs(40)])
    ended, candidates, worker = 0, [], 0
    while ended < 40 or not candidates:
        worker += 1
        assert worker < 200, "the others do not go on"
        leased = await driver.lease(f"w{worker}", 50)
        if any(job.spec == b"deadly" for job in leased):
            lost = 0
            while lost < len(leased):
                requeued, found = await driver.reap()
                lost += requeued + len(found)
                candidates += found
        else:
            ended += len(leased)
            await driver.commit(f"w{worker}", [end(job) for job in leased])
    assert len(candidates) == 1
    assert [x.attempt for x in candidates[0].lost] == [1, 2, 3]


async def test_an_isolated_job_is_leased_only_to_a_worker_that_holds_nothing(
    driver: Driver,
) -> None:
    await driver.submit(jobs(1, "suspect"))
    await lose(driver, "lost")
    await driver.submit(jobs(3))
    busy = await driver.lease("w", 0)
    (isolated,) = await driver.lease("w", 5)
    assert (busy, isolated.queue.queue_class) == ([], "isolate_group")

    # Nothing beside it, until it has ended.
    assert await driver.lease("w", 5) == []
    await driver.commit("w", [end(isolated)])
    assert len(await driver.lease("w", 5)) == 3


async def test_isolated_jobs_and_others_take_turns(driver: Driver) -> None:
    await driver.submit(jobs(20, "suspect"))
    await lose(driver, "lost", 20)
    await driver.submit(jobs(4))
    classes = []
    while leased := await driver.lease("w", 50):
        classes.append((leased[0].queue.queue_class, len(leased)))
        await driver.commit("w", [end(job) for job in leased])
    assert classes == [("isolate_group", 16), ("interactive", 4), ("isolate_group", 4)]


async def test_a_worker_finishes_what_it_holds_before_an_isolated_job(driver: Driver) -> None:
    await driver.submit(jobs(3))
    await driver.lease("lost", 1)
    await driver.reap_until(requeued=1)
    (held,) = [
        job for job in await driver.lease("w", 1) if job.queue.queue_class == "isolate_group"
    ]
    await driver.commit("w", [end(held)])
    (held,) = await driver.lease("w", 1)
    await driver.lease("lost", 1)
    async with asyncio.timeout(10):
        while await driver.reap() != (1, []):
            await driver.queue.renew("w", [lease_of(held)])

    assert await driver.lease("w", 5) == []
    await driver.commit("w", [end(held)])
    (isolated,) = await driver.lease("w", 5)
    assert isolated.queue.queue_class == "isolate_group"


async def test_cancelling_ends_queued_and_leased_jobs(
    driver: Driver, results: Results, store: redis.asyncio.Redis, keys: Keys
) -> None:
    submission = await driver.submit(jobs(3, timeout=60))
    (leased,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(lease_of(leased), 1, "", b"half")])

    ends = [cancelled(job_id) for job_id in [*submission.job_ids, "unknown-0"]]
    assert await driver.queue.end(ends) == [QUEUE, QUEUE, QUEUE, None]
    assert await driver.queue.end(ends) == [None] * 4

    assert await driver.commit("w", [end(leased, number=2)]) == [LOST]
    assert await driver.queue.renew("w", [lease_of(leased)]) == [lease_of(leased)]
    assert await driver.lease("w", 5) == []
    chunks = [c.data async for c in results.read(submission.id, 0, 0)]
    assert chunks == [ending.data for ending in ends[:3]]
    assert await driver.queue.ended() == {"CANCELLED": 3}
    await results.acknowledge(submission.id, 3)
    await driver.reap()
    for pattern in ("*job:*", "*chunks:*", "*queue:*", "*held:*", "*deadlines*"):
        assert not await store.keys(pattern), pattern


async def test_a_job_that_waits_for_another_attempt_can_be_cancelled(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    submission = await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    await driver.queue.retry("w", [lease_of(job)])
    assert await driver.queue.end([cancelled(submission.job_ids[0])]) == [QUEUE]
    assert await store.zcard(keys("delayed")) == 0


async def test_an_ending_meant_for_an_earlier_attempt_does_nothing(driver: Driver) -> None:
    await driver.submit(jobs(1))
    (job,) = await lose(driver, "w")
    (again,) = await driver.lease("v", 1)
    assert await driver.queue.end([TerminalResult(job.job_id, 1, "FAILED", b"")]) == [None]
    assert await driver.queue.end([TerminalResult(job.job_id, 2, "FAILED", b"")]) == [
        QueueName("isolate_group", "t", "m")
    ]
    assert await driver.commit("v", [end(again)]) == [LOST]


async def test_jobs_past_their_timeout_are_named(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    late = await driver.submit(jobs(2, timeout=0.001))
    await driver.submit(jobs(1, timeout=60))
    await driver.submit(jobs(1))
    assert await store.zcard(keys("deadlines")) == 3
    seconds, microseconds = await store.time()
    started = seconds + microseconds / 1e6
    while len(found := await driver.maintenance.overdue()) < 2:
        seconds, microseconds = await store.time()
        assert seconds + microseconds / 1e6 < started + 10
    assert sorted(found) == sorted(late.job_ids)


async def test_an_ended_job_has_no_timeout(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await driver.submit(jobs(1, timeout=60))
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [end(job)])
    assert await store.zcard(keys("deadlines")) == 0


async def test_an_empty_queue_is_deleted_and_made_again(
    driver: Driver, store: redis.asyncio.Redis
) -> None:
    for _ in range(2):
        await driver.submit(jobs(1))
        (job,) = await driver.lease("w", 1)
        await driver.reap()
        assert await driver.shard.queues() == [str(QUEUE).encode()]
        await driver.commit("w", [end(job)])
        await driver.reap()
        assert await driver.shard.queues() == []
        assert not await store.keys("*queue:*")
        assert not await store.keys("*vt_active:*")


async def test_lost_chunks_are_not_counted_as_results(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [NewChunk(Lease(job.job_id, 1), 1, "", b"12345")])
    assert int(await store.hget(keys("load"), "results")) == 5
    await driver.reap_until(requeued=1)
    assert int(await store.hget(keys("load"), "results")) == 0


async def test_nobody_looked_for_a_while(driver: Driver, settings: Settings) -> None:
    """
    Given a lease that ran out while nobody looked after leases (Redis was away, say)
    If they are looked after again
    I expect the lease not to be lost for as long as a worker has to renew it, and then to be.
    """
    await driver.submit(jobs(1))
    await driver.maintenance.watchdog_tick()
    await driver.lease("w", 1)
    await asyncio.sleep(1.2 * settings.lease)  # this long nobody looks
    (queue,) = await driver.shard.queues()
    # A call that was on its way when Redis went comes first.
    assert await driver.maintenance.reap(queue) == (0, [])
    await driver.maintenance.watchdog_tick()
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(10 * settings.lease):
        while True:
            await driver.maintenance.watchdog_tick()
            requeued, _ = await driver.maintenance.reap(queue)
            if requeued:
                break
            await asyncio.sleep(settings.lease / 10)
    waited = asyncio.get_running_loop().time() - began
    assert 0.8 * settings.lease < waited


async def test_a_listing_of_large_quarantined_jobs_is_short(
    store: redis.asyncio.Redis, keys: Keys, settings: Settings
) -> None:
    driver = Driver.over(store, replace(settings, max_bytes=1 << 30, max_lost_leases=1))
    await driver.submit([NewJob("m", bytes(15 << 20))] * 4)
    leased = [await driver.lease(f"w{number}", 1) for number in range(4)]
    assert all(leased)
    candidates = await driver.reap_until(candidates=4)
    await driver.queue.end([quarantined(job) for job in candidates])
    assert len(await driver.store.quarantine.latest(100)) == 2
    assert len(await driver.store.quarantine.latest(1)) == 1
