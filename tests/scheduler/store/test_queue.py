import asyncio

import pytest
import redis.asyncio
from reltrace_scheduler.errors import QueueFullError
from reltrace_scheduler.store.keys import GROUP, REAPER, Keys
from reltrace_scheduler.store.queue import LOST, STORED, Queue
from reltrace_scheduler.store.records import Lease, LeasedJob, NewChunk, NewJob
from reltrace_scheduler.store.results import Results

LEASE = 0.5  # seconds, as in the settings fixture


def jobs(count: int) -> list[NewJob]:
    return [NewJob("m", f"spec {index}".encode()) for index in range(count)]


def lease_of(job: LeasedJob) -> Lease:
    return Lease(job.job_id, job.attempt)


def end(job: LeasedJob, data: bytes = b"result", number: int = 1) -> NewChunk:
    return NewChunk(lease_of(job), number, "SUCCEEDED", data)


async def reap_until(queue: Queue, *, requeued: int = 0, condemned: int = 0) -> list:
    """Reap until so much was found: leases run out on Redis' clock, not on ours."""
    total, found = 0, []
    async with asyncio.timeout(10):
        while total < requeued or len(found) < condemned:
            count, jobs = await queue.reap("m")
            total, found = total + count, found + jobs
            await asyncio.sleep(0.02)
    assert (total, len(found)) == (requeued, condemned)
    return found


async def test_jobs_are_leased_in_order_with_their_specs(queue: Queue) -> None:
    submission = await queue.submit(jobs(3), "")

    leased = await queue.lease("m", "w", 2)
    rest = await queue.lease("m", "w", 2)

    assert [job.job_id for job in leased + rest] == submission.job_ids
    assert [job.spec for job in leased + rest] == [b"spec 0", b"spec 1", b"spec 2"]
    assert {job.attempt for job in leased + rest} == {1}
    assert await queue.lease("m", "w", 2) == []


async def test_a_job_is_leased_to_one_worker_only(queue: Queue) -> None:
    await queue.submit(jobs(20), "")

    batches = await asyncio.gather(*(queue.lease("m", f"w{i}", 5) for i in range(8)))

    ids = [job.job_id for batch in batches for job in batch]
    assert len(ids) == len(set(ids)) == 20


async def test_the_same_idempotency_key_gives_the_same_jobs(queue: Queue) -> None:
    first = await queue.submit(jobs(2), "key")
    again = await queue.submit(jobs(5), "key")

    assert again.job_ids == first.job_ids
    assert (first.deduplicated, again.deduplicated) == (False, True)
    assert (await queue.depth("m")).queued == 2


async def test_without_a_key_every_submission_is_new(queue: Queue) -> None:
    assert (await queue.submit(jobs(1), "")).id != (await queue.submit(jobs(1), "")).id


async def test_past_the_bound_on_jobs_nothing_is_accepted(queue: Queue) -> None:
    await queue.submit(jobs(40), "")

    with pytest.raises(QueueFullError, match="the bounds are 50 jobs"):
        await queue.submit(jobs(11), "key")

    assert (await queue.depth("m")).queued == 40
    assert not (await queue.submit(jobs(10), "key")).deduplicated


async def test_past_the_bound_on_bytes_nothing_is_accepted(queue: Queue) -> None:
    with pytest.raises(QueueFullError, match="1048576 bytes"):
        await queue.submit([NewJob("m", bytes(1 << 20)), NewJob("m", b"x")], "")
    assert (await queue.depth("m")).queued == 0


async def test_ended_jobs_make_room(queue: Queue) -> None:
    await queue.submit(jobs(50), "")
    leased = await queue.lease("m", "w", 50)
    await queue.commit("w", [end(job) for job in leased])
    await queue.submit(jobs(50), "")


async def test_a_result_needs_the_lease(queue: Queue) -> None:
    await queue.submit(jobs(1), "")
    (job,) = await queue.lease("m", "w", 1)

    assert await queue.commit("other", [end(job)]) == [LOST]
    wrong_attempt = NewChunk(Lease(job.job_id, 2), 1, "SUCCEEDED", b"")
    assert await queue.commit("w", [wrong_attempt]) == [LOST]
    assert await queue.commit("w", [NewChunk(Lease("no-1", 1), 1, "SUCCEEDED", b"")]) == [LOST]
    assert await queue.commit("w", [end(job)]) == [STORED]


async def test_a_result_sent_twice_is_stored_once(queue: Queue, results: Results) -> None:
    submission = await queue.submit(jobs(1), "")
    (job,) = await queue.lease("m", "w", 1)

    assert await queue.commit("w", [end(job)]) == [STORED]
    assert await queue.commit("w", [end(job, b"again")]) == [STORED]

    assert [c.data async for c in results.read(submission.id, 0, 0)] == [b"result"]


async def test_chunks_out_of_order_are_refused(queue: Queue) -> None:
    await queue.submit(jobs(1), "")
    (job,) = await queue.lease("m", "w", 1)
    assert await queue.commit("w", [end(job, number=2)]) == [-1]
    assert (await queue.depth("m")).leased == 1


async def test_renewal_keeps_a_lease_ten_times_its_length(queue: Queue) -> None:
    await queue.submit(jobs(2), "")
    kept, lost = await queue.lease("m", "w", 2)

    async with asyncio.timeout(30):
        for _ in range(50):
            assert await queue.renew("m", "w", [lease_of(kept)]) == []
            await asyncio.sleep(LEASE / 5)
            await queue.reap("m")

    assert await queue.renew("m", "w", [lease_of(kept), lease_of(lost)]) == [lease_of(lost)]
    assert await queue.commit("w", [end(kept), end(lost)]) == [STORED, LOST]
    (again,) = await queue.lease("m", "w2", 5)
    assert (again.job_id, again.attempt) == (lost.job_id, 2)


async def test_a_lost_lease_fences_its_worker_out(queue: Queue, results: Results) -> None:
    submission = await queue.submit(jobs(1), "")
    (slow,) = await queue.lease("m", "slow", 1)
    await queue.commit("slow", [NewChunk(lease_of(slow), 1, "", b"half")])
    await reap_until(queue, requeued=1)
    (fast,) = await queue.lease("m", "fast", 1)

    assert await queue.commit("slow", [end(slow, number=2)]) == [LOST]
    assert await queue.commit("fast", [end(fast, b"whole")]) == [STORED]
    assert await queue.commit("slow", [end(slow, number=2)]) == [LOST]

    assert [c.data async for c in results.read(submission.id, 0, 0)] == [b"whole"]


async def test_a_job_handed_back_is_queued_at_once(queue: Queue) -> None:
    await queue.submit(jobs(1), "")
    (job,) = await queue.lease("m", "w", 1)

    assert await queue.requeue("m", "other", [lease_of(job)]) == 0
    assert await queue.requeue("m", "w", [lease_of(job)]) == 1
    assert await queue.requeue("m", "w", [lease_of(job)]) == 0

    (again,) = await queue.lease("m", "w2", 1)
    assert again.attempt == 2


async def test_the_third_lost_lease_condemns_a_job(queue: Queue) -> None:
    await queue.submit(jobs(1), "")
    for attempt in (1, 2):
        (job,) = await queue.lease("m", f"w{attempt}", 1)
        assert job.attempt == attempt
        await reap_until(queue, requeued=1)
    (job,) = await queue.lease("m", "w3", 1)

    (condemned,) = await reap_until(queue, condemned=1)

    assert (condemned.job_id, condemned.attempt) == (job.job_id, 3)
    assert [line.split()[:2] for line in condemned.history] == [
        ["1", "w1"],
        ["2", "w2"],
        ["3", "w3"],
    ]
    assert await queue.commit("w3", [end(job)]) == [LOST]

    # If the reaper dies before it has written the end, the next one finds the job again.
    (again,) = await reap_until(queue, condemned=1)
    assert again == condemned
    quarantined = NewChunk(Lease(job.job_id, 3), 1, "QUARANTINED", b"why")
    assert await queue.commit(REAPER, [quarantined]) == [STORED]
    (record,) = await queue.jobs([job.job_id])
    assert record is not None
    assert record.state == "QUARANTINED"
    assert await queue.ended() == {"QUARANTINED": 1}


async def test_a_job_handed_back_is_not_counted_as_lost(queue: Queue) -> None:
    await queue.submit(jobs(1), "")
    for _ in range(5):
        (job,) = await queue.lease("m", "w", 1)
        await queue.requeue("m", "w", [lease_of(job)])
    await queue.lease("m", "w", 1)
    await reap_until(queue, requeued=1)


async def test_nothing_is_counted_as_delivered_by_a_renewal(
    queue: Queue, store: redis.asyncio.Redis, keys: Keys
) -> None:
    await queue.submit(jobs(1), "")
    (job,) = await queue.lease("m", "w", 1)
    for _ in range(5):
        await queue.renew("m", "w", [lease_of(job)])
    (pending,) = await store.xpending_range(keys.queue("m"), GROUP, "-", "+", 10)
    assert pending["times_delivered"] == 1


async def test_leases_by_worker(queue: Queue) -> None:
    await queue.submit(jobs(5), "")
    await queue.lease("m", "a", 1)
    await queue.lease("m", "b", 2)
    depth = await queue.depth("m")
    assert (depth.queued, depth.leased, depth.leased_by) == (2, 3, {"a": 1, "b": 2})


async def test_states_of_jobs(queue: Queue) -> None:
    submission = await queue.submit(jobs(3), "")
    (job, _) = await queue.lease("m", "w", 2)
    await queue.commit("w", [NewChunk(lease_of(job), 1, "FAILED", b"")])
    records = await queue.jobs([*submission.job_ids, "unknown-0"])
    assert [r and (r.state, r.attempt) for r in records] == [
        ("FAILED", 1),
        ("LEASED", 1),
        ("QUEUED", 0),
        None,
    ]


async def test_keys_that_outlive_an_acknowledged_submission(
    queue: Queue, results: Results, store: redis.asyncio.Redis
) -> None:
    submission = await queue.submit(jobs(2), "key")
    small, large = await queue.lease("m", "w", 2)
    await queue.commit(
        "w", [NewChunk(lease_of(large), 1, "", b"1"), end(large, b"2", 2), end(small)]
    )
    await results.acknowledge(submission.id, 2)

    prefix = "reltrace:{0}:"
    assert {key.decode().removeprefix(prefix) for key in await store.keys()} == {
        "queue:m",  # an empty stream with its group
        "idempotency:key",  # until its own time is over
        "load",
        "ended",
    }
    assert await store.hgetall(f"{prefix}load") == {b"jobs": b"0", b"bytes": b"0"}
    assert await store.xlen(f"{prefix}queue:m") == 0
