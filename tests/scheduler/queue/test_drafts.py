"""Drafts in Redis: only under a lease, never many, and gone with it."""

import pytest
import redis.asyncio
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue import results as module
from reltrace_scheduler.queue.results import FIRST_DRAFT, Results
from reltrace_scheduler.records import Lease, StoredDraft, TerminalResult
from scheduler.driver import Driver, end, jobs, lease_of


def data(found: dict[str, list[StoredDraft]]) -> dict[str, list[bytes]]:
    return {job: [draft.data for draft in row] for job, row in found.items()}


async def test_drafts_are_read_on_from_where_one_was(driver: Driver, results: Results) -> None:
    await driver.submit(jobs(2))
    one, two = [lease_of(job) for job in await driver.lease("w", 2)]
    assert await results.write_drafts("w", [(one, b"a"), (two, b"x")]) == 2
    assert await results.write_drafts("w", [(one, b"b")]) == 1
    found = await results.read_drafts({one.job_id: FIRST_DRAFT, two.job_id: FIRST_DRAFT})
    assert data(found) == {one.job_id: [b"a", b"b"], two.job_id: [b"x"]}
    first, last = found[one.job_id]
    assert data(await results.read_drafts({one.job_id: first.position})) == {one.job_id: [b"b"]}
    assert await results.read_drafts({one.job_id: last.position}) == {}
    assert await results.read_drafts({"no-0": FIRST_DRAFT}) == {}


async def test_only_who_holds_a_job_drafts_it(driver: Driver, results: Results) -> None:
    """
    Given a job that was leased to another worker since, one that ended, and one that is unknown
    I expect none of their drafts to be kept.
    """
    await driver.submit(jobs(2))
    lost, over = await driver.lease("w", 2)
    await driver.queue.release("w", [lease_of(lost)])
    (found,) = await driver.lease("other", 1)
    assert found.job_id == lost.job_id
    await driver.commit("w", [end(over)])
    late = [
        (lease_of(lost), b"late"),
        (Lease(found.job_id, found.attempt), b"not its own"),
        (lease_of(over), b"late"),
        (Lease("nobody-0", 1), b"?"),
    ]
    assert await results.write_drafts("w", late) == 0
    assert await results.write_drafts("other", [(lease_of(found), b"good")]) == 1
    kept = await results.read_drafts({lost.job_id: FIRST_DRAFT, over.job_id: FIRST_DRAFT})
    assert data(kept) == {lost.job_id: [b"good"]}


async def test_another_attempt_is_read_from_its_first_draft(
    driver: Driver, results: Results
) -> None:
    """
    Given a reader that has read what an attempt drafted
    If its lease ends and another worker drafts the job
    I expect the reader to get every draft of that, and whoever comes new nothing of the first.
    """
    await driver.submit(jobs(1))
    (first,) = await driver.lease("w", 1)
    await results.write_drafts("w", [(lease_of(first), text) for text in (b"a", b"b", b"c")])
    position = (await results.read_drafts({first.job_id: FIRST_DRAFT}))[first.job_id][-1].position
    await driver.queue.release("w", [lease_of(first)])
    (second,) = await driver.lease("other", 1)
    await results.write_drafts("other", [(lease_of(second), b"A")])
    for after in (position, FIRST_DRAFT):
        assert data(await results.read_drafts({first.job_id: after})) == {first.job_id: [b"A"]}


@pytest.mark.parametrize("way", ["ended", "cancelled", "handed back", "failed", "unknown", "lost"])
async def test_they_go_with_the_lease(
    driver: Driver,
    results: Results,
    store: redis.asyncio.Redis,
    keys: Keys,
    way: str,
) -> None:
    """However a lease ends, nothing is left of what was drafted under it."""
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    assert await results.write_drafts("w", [(lease_of(job), b"x")]) == 1
    assert await store.exists(keys("draft", job.job_id))
    match way:
        case "ended":
            await driver.commit("w", [end(job)])
        case "cancelled":
            await driver.queue.end([TerminalResult(job.job_id, None, "CANCELLED", b"cancelled")])
        case "handed back":
            await driver.queue.release("w", [lease_of(job)])
        case "failed":
            await driver.queue.retry("w", [lease_of(job)])
        case "unknown":
            await driver.queue.reconcile("w", [])
        case "lost":
            await driver.reap_until(requeued=1)
    assert not await store.exists(keys("draft", job.job_id))
    assert await store.hget(keys("job", job.job_id), "drafted") is None


async def test_they_are_never_many(
    driver: Driver, results: Results, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a worker that drafts without end, much or little at a time
    I expect no more than the bound to be kept, and another attempt to be drafted again.
    """
    await driver.submit(jobs(2))
    large, small = await driver.lease("w", 2)
    for job, draft in ((large, b"x" * 10_000), (small, b"")):
        many = [(lease_of(job), draft)] * 4_000
        kept = sum([await results.write_drafts("w", many) for _ in range(5)])
        assert 0 < kept < len(many) * 5
        assert await store.xlen(keys("draft", job.job_id)) == kept
        # What Redis itself needs for it is within the bound too, but for its last node.
        assert await store.memory_usage(keys("draft", job.job_id)) < module._DRAFT_BYTES * 1.2
        assert 0 < await store.pttl(keys("draft", job.job_id)) <= 1000 * module._DRAFT_TTL
        assert await results.write_drafts("w", [(lease_of(job), draft)]) == 0
        await driver.queue.release("w", [lease_of(job)])
        (again,) = await driver.lease("w", 1)
        assert await results.write_drafts("w", [(lease_of(again), draft)]) == 1
