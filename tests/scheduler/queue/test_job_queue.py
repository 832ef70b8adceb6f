import asyncio
from dataclasses import replace

import pytest
import redis.asyncio
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import (
    IdempotencyError,
    QueueFullError,
    SupersededError,
    TooLargeError,
)
from reltrace_scheduler.keys import GROUP, Keys
from reltrace_scheduler.queue.job_queue import LOST, OUT_OF_ORDER, STORED
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.queue.shards import Shard
from reltrace_scheduler.records import Lease, NewChunk, NewJob, Priority
from scheduler.driver import EPOCH, MODEL, Driver, end, jobs, lease_of

LEASE = 0.5  # seconds, as in the settings fixture


async def test_jobs_are_leased_in_order_with_their_specs(driver: Driver) -> None:
    submission = await driver.submit(jobs(3))

    leased = await driver.lease("w", 2)
    rest = await driver.lease("w", 2)

    assert [job.job_id for job in leased + rest] == submission.job_ids
    assert [job.spec for job in leased + rest] == [b"spec 0", b"spec 1", b"spec 2"]
    assert {job.attempt for job in leased + rest} == {1}
    assert await driver.lease("w", 2) == []


async def test_a_job_is_leased_to_one_worker_only(driver: Driver) -> None:
    await driver.submit(jobs(20))

    batches = await asyncio.gather(*(driver.lease(f"w{i}", 5) for i in range(8)))

    ids = [job.job_id for batch in batches for job in batch]
    assert len(ids) == len(set(ids)) == 20


async def test_the_same_idempotency_key_gives_the_same_jobs(driver: Driver) -> None:
    first = await driver.submit(jobs(2), "key")
    again = await driver.submit(jobs(2), "key")

    assert again.job_ids == first.job_ids
    assert (first.deduplicated, again.deduplicated) == (False, True)
    assert (await driver.depth())[0] == 2


async def test_an_idempotency_key_names_these_jobs_only(driver: Driver) -> None:
    await driver.submit(jobs(2), "key")
    for other in (jobs(3), jobs(2, "other")):
        with pytest.raises(IdempotencyError, match="idempotency_key"):
            await driver.submit(other, "key")
    with pytest.raises(IdempotencyError):
        await driver.submit(jobs(2), "key", priority=Priority.BATCH)
    assert not (await driver.submit(jobs(3), "key", tenant="another")).deduplicated


async def test_without_a_key_every_submission_is_new(driver: Driver) -> None:
    assert (await driver.submit(jobs(1), "")).id != (await driver.submit(jobs(1))).id


async def test_past_the_bound_on_jobs_nothing_is_accepted(driver: Driver) -> None:
    await driver.submit(jobs(40))

    with pytest.raises(QueueFullError, match="the bounds are 50 jobs"):
        await driver.submit(jobs(11), "key")

    assert (await driver.depth())[0] == 40
    assert not (await driver.submit(jobs(10), "key")).deduplicated


async def test_past_the_bound_on_bytes_nothing_is_accepted(driver: Driver) -> None:
    await driver.submit([NewJob("m", bytes(1 << 19))])
    with pytest.raises(QueueFullError, match="1048576 bytes"):
        await driver.submit([NewJob("m", bytes(1 << 19)), NewJob("m", b"x")])
    assert (await driver.depth())[0] == 1


@pytest.mark.parametrize("busy", [False, True])
async def test_what_not_even_an_empty_queue_has_room_for_is_refused(
    driver: Driver, busy: bool
) -> None:
    if busy:
        await driver.submit(jobs(50))
    with pytest.raises(TooLargeError, match=r"jobs: 51 of .* all tenants .* bounds are 50 jobs"):
        await driver.submit(jobs(51))
    with pytest.raises(TooLargeError, match=r"1 of 1048577 bytes .* 1048576 bytes; send"):
        await driver.submit([NewJob("m", bytes((1 << 20) + 1))])


async def test_the_bound_of_a_shard_is_told(store: redis.asyncio.Redis, settings: Settings) -> None:
    sharded = Driver.over(store, replace(settings, shards=5))
    with pytest.raises(TooLargeError, match="10 jobs and 209716 bytes in each of 5 shards"):
        await sharded.submit(jobs(11))


async def test_ended_jobs_make_room(driver: Driver) -> None:
    await driver.submit(jobs(50))
    leased = await driver.lease("w", 50)
    await driver.commit("w", [end(job) for job in leased])
    await driver.submit(jobs(50))


async def test_a_result_needs_the_lease(driver: Driver) -> None:
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)

    assert await driver.commit("other", [end(job)]) == [LOST]
    wrong_attempt = NewChunk(Lease(job.job_id, 2), 1, "SUCCEEDED", b"")
    assert await driver.commit("w", [wrong_attempt]) == [LOST]
    assert await driver.commit("w", [NewChunk(Lease("no-1", 1), 1, "SUCCEEDED", b"")]) == [LOST]
    assert await driver.commit("w", [end(job)]) == [STORED]


async def test_a_result_sent_twice_is_stored_once(driver: Driver, results: Results) -> None:
    submission = await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)

    assert await driver.commit("w", [end(job)]) == [STORED]
    assert await driver.commit("w", [end(job, b"again")]) == [STORED]

    assert [c.data async for c in results.read(submission.id, 0, 0)] == [b"result"]


async def test_chunks_out_of_order_are_refused(driver: Driver) -> None:
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    assert await driver.commit("w", [end(job, number=2)]) == [OUT_OF_ORDER]
    assert (await driver.depth())[1] == 1


async def test_renewal_keeps_a_lease_ten_times_its_length(driver: Driver) -> None:
    await driver.submit(jobs(2))
    kept, lost = await driver.lease("w", 2)

    async with asyncio.timeout(30):
        for _ in range(50):
            assert await driver.queue.renew("w", [lease_of(kept)]) == []
            await asyncio.sleep(LEASE / 5)
            await driver.reap()

    assert await driver.queue.renew("w", [lease_of(kept), lease_of(lost)]) == [lease_of(lost)]
    assert await driver.commit("w", [end(kept), end(lost)]) == [STORED, LOST]
    (again,) = await driver.lease("w2", 5)
    assert (again.job_id, again.attempt) == (lost.job_id, 2)


async def test_a_check_renews_nothing(driver: Driver) -> None:
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    async with asyncio.timeout(30):
        while await driver.reap() != (1, []):
            assert await driver.queue.renew("w", [lease_of(job)], check_only=True) == []
            await asyncio.sleep(LEASE / 5)
    lost = await driver.queue.renew("w", [lease_of(job)], check_only=True)
    assert lost == [lease_of(job)]


async def test_a_lost_lease_fences_its_worker_out(driver: Driver, results: Results) -> None:
    submission = await driver.submit(jobs(1))
    (slow,) = await driver.lease("slow", 1)
    await driver.commit("slow", [NewChunk(lease_of(slow), 1, "", b"half")])
    await driver.reap_until(requeued=1)
    (fast,) = await driver.lease("fast", 1)

    assert await driver.commit("slow", [end(slow, number=2)]) == [LOST]
    assert await driver.commit("fast", [end(fast, b"whole")]) == [STORED]
    assert await driver.commit("slow", [end(slow, number=2)]) == [LOST]

    assert [c.data async for c in results.read(submission.id, 0, 0)] == [b"whole"]


async def test_a_job_handed_back_is_queued_at_once(driver: Driver) -> None:
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)

    assert await driver.queue.release("other", [lease_of(job)]) == 0
    assert await driver.queue.release("w", [lease_of(job)]) == 1
    assert await driver.queue.release("w", [lease_of(job)]) == 0

    (again,) = await driver.lease("w2", 1)
    assert again.attempt == 2


async def test_a_job_handed_back_is_not_counted_as_lost(driver: Driver) -> None:
    await driver.submit(jobs(1))
    for _ in range(5):
        (job,) = await driver.lease("w", 1)
        await driver.queue.release("w", [lease_of(job)])
    await driver.lease("w", 1)
    await driver.reap_until(requeued=1)


async def test_nothing_is_counted_as_delivered_by_a_renewal(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    for _ in range(5):
        await driver.queue.renew("w", [lease_of(job)])
    (pending,) = await store.xpending_range(
        keys("queue", f"interactive:t:{MODEL}"), GROUP, "-", "+", 10
    )
    assert pending["times_delivered"] == 1


async def test_depth(driver: Driver) -> None:
    await driver.submit(jobs(3))
    await driver.submit(jobs(2), tenant="u", priority=Priority.BATCH)
    await driver.lease("a", 1)
    await driver.lease("b", 2)
    assert await driver.depth() == (2, 3)


async def test_states_of_jobs(driver: Driver) -> None:
    submission = await driver.submit(jobs(3))
    (job, _) = await driver.lease("w", 2)
    await driver.commit("w", [NewChunk(lease_of(job), 1, "FAILED", b"")])
    records = await driver.queue.jobs([*submission.job_ids, "unknown-0"], tenant="t")
    assert [r and (r.state, r.attempt) for r in records] == [
        ("FAILED", 1),
        ("LEASED", 1),
        ("QUEUED", 0),
        None,
    ]


async def test_another_tenants_jobs_are_unknown(driver: Driver) -> None:
    submission = await driver.submit(jobs(1))
    assert await driver.queue.jobs(submission.job_ids, tenant="u") == [None]


async def test_keys_that_outlive_an_acknowledged_submission(
    driver: Driver, results: Results, store: redis.asyncio.Redis
) -> None:
    submission = await driver.submit(jobs(2), "key")
    timed = await driver.submit(jobs(1, timeout=60), priority=Priority.BATCH)
    small, large, other = await driver.lease("w", 3)
    await driver.commit(
        "w", [NewChunk(lease_of(large), 1, "", b"1"), end(large, b"2", 2), end(small), end(other)]
    )
    await results.acknowledge(submission.id, 2)
    await results.acknowledge(timed.id, 1)
    await driver.reap()

    prefix = "reltrace:{0}:"
    assert {key.decode().removeprefix(prefix) for key in await store.keys()} == {
        "idempotency:t:key",  # until its own time is over
        "load",
        "ended",
        "virtual_time",
        "tenants",
        "tenant:t",
        "worker:w",  # until it is forgotten
    }
    nothing = {b"jobs": b"0", b"bytes": b"0", b"results": b"0"}
    assert await store.hgetall(f"{prefix}load") == nothing
    assert await store.hgetall(f"{prefix}tenant:t") == nothing


async def test_a_former_session_leases_nothing(driver: Driver) -> None:
    await driver.submit(jobs(1))
    await driver.enter("w")
    with pytest.raises(SupersededError, match="connected anew"):
        await driver.queue.lease(driver.shard, MODEL, "w", "another", 1, 1)
    assert len((await driver.queue.lease(driver.shard, MODEL, "w", EPOCH, 1, 1)).jobs) == 1


async def test_what_a_worker_does_not_know_of_is_queued_again(driver: Driver) -> None:
    await driver.submit(jobs(3))
    known, *_ = await driver.lease("w", 3)

    assert await driver.queue.reconcile("w", [lease_of(known)]) == 2
    assert await driver.queue.reconcile("w", [lease_of(known)]) == 0

    again = await driver.lease("v", 3)
    assert {job.attempt for job in again} == {2}
    # Nobody lost them: they are not suspects.
    assert {job.queue.queue_class for job in again} == {"interactive"}


@pytest.fixture
def patient(store: redis.asyncio.Redis) -> Driver:
    settings = Settings(retry_delay=1.0, max_failures=3)
    return Driver.over(store, settings)


async def test_a_failed_attempt_waits_longer_each_time(
    patient: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await patient.submit(jobs(1))
    waits = []
    for attempt in range(1, 4):
        (job,) = await patient.lease("w", 1)
        assert job.attempt == attempt
        assert await patient.queue.retry("w", [lease_of(job)]) == []
        assert await patient.lease("w", 1) == []
        seconds, microseconds = await store.time()
        ((_, due),) = await store.zrange(keys("delayed"), 0, -1, withscores=True)
        waits.append(due / 1000 - seconds - microseconds / 1e6)
        await store.zadd(keys("delayed"), {job.job_id: 0})
        assert await patient.maintenance.promote() == 1
    assert waits == pytest.approx([1.0, 2.0, 4.0], abs=0.5)

    (job,) = await patient.lease("w", 1)
    assert await patient.queue.retry("w", [lease_of(job)]) == [lease_of(job)]
    assert await patient.depth() == (0, 1)


async def test_a_wait_that_is_not_over_goes_on(patient: Driver) -> None:
    await patient.submit(jobs(1))
    (job,) = await patient.lease("w", 1)
    await patient.queue.retry("w", [lease_of(job)])
    assert await patient.maintenance.promote() == 0


async def twice(shard: Shard, *arguments: object, run=Shard.run, **options: bool) -> object:
    """A Redis whose answers come too late: redis-py sends each script once more."""
    await run(shard, *arguments, **options)
    return await run(shard, *arguments, **options)


async def test_a_submission_that_redis_is_sent_twice_is_accepted_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, store: redis.asyncio.Redis, keys: Keys
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "run", twice)
        submission = await driver.submit(jobs(3))
    leased = await driver.lease("w", 10)
    assert [job.job_id for job in leased] == submission.job_ids
    await driver.commit("w", [end(job) for job in leased])
    assert await driver.lease("w", 10) == []
    assert {int(n) for n in await store.hmget(keys("load"), "jobs", "bytes")} == {0}


async def test_a_lease_that_redis_is_sent_twice_leases_nothing_more_and_breaks_off(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a lease whose answer comes too late, so that it is sent again
    I expect an error, which ends the worker's stream; when it connects anew, the jobs that it was
    not told of are queued again, and none of them counts as lost.
    """
    await driver.submit(jobs(6))
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "run", twice)
        with pytest.raises(redis.exceptions.TimeoutError, match="too late"):
            await driver.lease("w", 2)
    assert await driver.depth() == (4, 2)
    assert await driver.queue.reconcile("w", []) == 2
    assert await driver.depth() == (6, 0)
    again = await driver.lease("w", 10)
    assert {(job.attempt, job.queue.queue_class) for job in again} == {
        (1, "interactive"),
        (2, "interactive"),
    }


async def test_what_a_lease_read_and_did_not_lease_is_queued_again(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given entries that were read by a call that broke off in their middle
    If they grow old
    I expect their jobs to be leased after all, as often as any other.
    """
    submission = await driver.submit(jobs(3))
    (queue,) = await driver.shard.queues()
    await store.xreadgroup(GROUP, "w", {keys("queue", queue.decode()): ">"})
    await driver.reap_until(requeued=3)
    leased = await driver.lease("w", 10)
    assert [(job.job_id, job.attempt) for job in leased] == [
        (job_id, 1) for job_id in submission.job_ids
    ]


async def test_an_entry_of_a_job_that_is_gone_stops_nobody(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    first = await driver.submit(jobs(1))
    (queue,) = await driver.shard.queues()
    await store.xadd(keys("queue", queue.decode()), {"j": "gone-0"})
    await store.xadd(keys("queue", queue.decode()), {"j": first.job_ids[0]})
    second = await driver.submit(jobs(1))
    leased = await driver.lease("w", 10)
    assert [job.job_id for job in leased] == [*first.job_ids, *second.job_ids]
    assert await driver.depth() == (0, 2)


async def test_large_specifications_are_handed_over_a_few_at_a_time(
    store: redis.asyncio.Redis, keys: Keys, settings: Settings
) -> None:
    driver = Driver.over(store, replace(settings, max_bytes=1 << 30))
    await driver.submit([NewJob(MODEL, b"tiny")])
    await driver.submit([NewJob(MODEL, bytes(6 << 20))] * 4)
    sizes = [[len(job.spec) for job in await driver.lease(f"w{n}", 16)] for n in range(4)]
    assert sizes == [[4, 6 << 20, 6 << 20], [6 << 20, 6 << 20], [], []]
    (queue,) = await driver.shard.queues()
    assert await store.hexists(keys("virtual_time"), f"large:{queue.decode()}")


async def test_a_backlog_of_one_model_takes_no_share_of_another(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """Of the jobs of a model each of two workers may hold half, whatever else they hold."""
    await driver.submit(jobs(30))
    assert len(await driver.lease("w", 20, workers=2)) == 15
    await driver.submit([NewJob("other", b"spec")] * 4)
    leased = await driver.queue.lease(driver.shard, "other", "w", EPOCH, 20, 20, 2)
    assert len(leased.jobs) == 2
    assert len((await driver.queue.lease(driver.shard, "other", "w", EPOCH, 20, 20, 2)).jobs) == 0


async def test_commands_of_a_tiny_job(driver: Driver, store: redis.asyncio.Redis) -> None:
    """
    Given 64 and 192 jobs that are submitted, leased, ended, read and acknowledged together
    I expect each job beyond the first 64 to cost nine commands of Redis, those of scripts included.
    """

    async def calls(count: int) -> int:
        await store.config_resetstat()
        submission = await driver.submit([NewJob(MODEL, b"spec", result_bytes=9)] * count)
        leased = await driver.lease("w", count)
        await driver.commit("w", [end(job) for job in leased])
        read = [chunk async for chunk in driver.results.read(submission.id, 0, 0)]
        assert len(read) == count
        await driver.results.acknowledge(submission.id, count)
        return sum(int(row["calls"]) for row in (await store.info("commandstats")).values())

    settings = replace(driver.store.settings, max_jobs=1000, tenant_max_jobs=1000)
    driver = Driver.over(store, settings)
    await calls(1)
    assert (await calls(192) - await calls(64)) / 128 <= 9
