"""Drafts in Redis: only under a lease, never many, and gone by themselves."""

import redis.asyncio
from reltrace_scheduler.store import drafts as module
from reltrace_scheduler.store.drafts import Drafts
from reltrace_scheduler.store.keys import Keys
from reltrace_scheduler.store.records import Lease, NewDraft
from scheduler.driver import Driver, end, jobs, lease_of


async def test_drafts_are_read_on_from_where_one_was(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    drafts = Drafts(store, keys)
    await driver.submit(jobs(2))
    one, two = [lease_of(job) for job in await driver.lease("w", 2)]
    assert await drafts.write("w", [NewDraft(one, b"a"), NewDraft(two, b"x")]) == 2
    assert await drafts.write("w", [NewDraft(one, b"b")]) == 1
    nothing = {one.job_id: 0, two.job_id: 0}
    assert await drafts.read(nothing) == {one.job_id: [b"a", b"b"], two.job_id: [b"x"]}
    assert await drafts.read({one.job_id: 1, two.job_id: 1}) == {one.job_id: [b"b"]}
    assert await drafts.read({"no-0": 0}) == {}


async def test_only_who_holds_a_job_drafts_it(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a job that was leased to another worker since, one that ended, and one that is unknown
    I expect none of their drafts to be kept.
    """
    drafts = Drafts(store, keys)
    await driver.submit(jobs(2))
    lost, over = await driver.lease("w", 2)
    await driver.queue.release("w", [lease_of(lost)])
    (found,) = await driver.lease("other", 1)
    assert found.job_id == lost.job_id
    await driver.commit("w", [end(over)])
    late = [
        NewDraft(lease_of(lost), b"late"),
        NewDraft(Lease(found.job_id, found.attempt), b"not its own"),
        NewDraft(lease_of(over), b"late"),
        NewDraft(Lease("nobody-0", 1), b"?"),
    ]
    assert await drafts.write("w", late) == 0
    assert await drafts.write("other", [NewDraft(lease_of(found), b"good")]) == 1
    assert await drafts.read({lost.job_id: 0, over.job_id: 0}) == {lost.job_id: [b"good"]}


async def test_they_go_by_themselves_and_are_never_many(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    drafts = Drafts(store, keys)
    await driver.submit(jobs(1))
    (job,) = await driver.lease("w", 1)
    many = [NewDraft(lease_of(job), b"x")] * 1000
    kept = sum([await drafts.write("w", many) for _ in range(5)])
    assert kept == module._MOST
    assert await store.llen(keys.draft(job.job_id)) == module._MOST
    assert 0 < await store.pttl(keys.draft(job.job_id)) <= module._TTL
