"""Results that nobody reads: who is told of them, and what frees them."""

import asyncio
from dataclasses import replace

import grpc
import pytest
import redis.asyncio
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, trace_pb2
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from scheduler.fake_worker import FakeWorker
from scheduler.trace_calls import JobSpec, collect, submission

SIZE = 30_000


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, lease=30, result_ttl=3600, tenant_max_bytes=2 * SIZE)


async def unread(client, worker: FakeWorker, count: int) -> str:
    """Have a submission's jobs end with results that nobody reads."""
    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * count))
    for lease in await worker.lease(count):
        await worker.finish([lease], bytes(SIZE))
        await worker.receive("committed")
    return answer.submission_id


async def test_who_waits_for_room_is_told_of_unread_results(
    client, channel: grpc.aio.Channel, worker: FakeWorker
) -> None:
    await unread(client, worker, 2)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.SubmitJobs(submission(JobSpec(prompt="a")))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    admin = admin_pb2_grpc.AdminServiceStub(channel)
    (tenant,) = (await admin.GetStatus(admin_pb2.GetStatusRequest())).tenants
    assert (tenant.tenant, tenant.jobs) == ("default", 0)
    assert 2 * SIZE < tenant.unread_bytes == tenant.bytes < 3 * SIZE
    message = refused.value.details()
    assert f"{tenant.unread_bytes} of them unread results" in message
    assert "otherwise 3600 s after its end" in message


async def test_results_of_a_cancelled_submission_are_freed_soon(
    client, worker: FakeWorker, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a submission that was cancelled, with results that nobody has read
    I expect its reader to have a minute for them, and then their room to be free.
    """
    held = await unread(client, worker, 2)
    seconds, _ = await store.time()
    assert await store.zscore(keys("expiring"), held) > 1000 * (seconds + 3000)
    request = trace_pb2.CancelJobsRequest(submission_id=held)
    assert (await client.CancelJobs(request)).cancelled == 0
    at = await store.zscore(keys("expiring"), held)
    assert 1000 * (seconds + 50) < at < 1000 * (seconds + 90)
    assert len(await collect(client, held)) == 2
    # It does not last longer for being cancelled again.
    await store.zadd(keys("expiring"), {held: at - 30_000})
    await client.CancelJobs(request)
    assert await store.zscore(keys("expiring"), held) == at - 30_000

    await store.zadd(keys("expiring"), {held: 1})
    async with asyncio.timeout(20):
        while int(await store.hget(keys("load"), "results")):
            await asyncio.sleep(0.05)
    assert (await client.SubmitJobs(submission(JobSpec(prompt="a")))).job_ids
