"""What a scheduler does by itself about those who do not come back."""

import asyncio

import grpc
import pytest
import redis.asyncio
from reltrace_proto.v1 import trace_pb2, types_pb2
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from scheduler.fake_worker import FakeWorker


@pytest.fixture
def settings() -> Settings:
    return Settings(
        listen="127.0.0.1:0", lease=1, result_ttl=1, max_unread=10_000, tenant_max_bytes=40_000
    )


async def test_a_client_that_dies_does_not_keep_its_tenant_out_for_ever(
    client, worker: FakeWorker, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given submissions whose unread results take all of their tenant's room, and whose client is dead
    If nobody reads them for as long as results are kept
    I expect their jobs to be ended and their memory to be free again, for who comes next.
    """
    request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")] * 3)
    first, second, third, last = [
        (await client.SubmitJobs(request)).submission_id for _ in range(4)
    ]
    for _ in range(5):
        (lease,) = await worker.lease(1)
        await worker.finish([lease], bytes(9000))
        await worker.receive("committed")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.SubmitJobs(request)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    (lease,) = await worker.lease(1)

    assert lease.job_id.startswith(last)
    # There is room for a lease before the last of them is ended.
    async with asyncio.timeout(20):
        while int(await store.hget(keys("load"), "results")):
            await asyncio.sleep(0.02)
    assert int(await store.hget(keys("load"), "jobs")) == 3
    for submission in (first, second, third):
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await client.CancelJobs(trace_pb2.CancelJobsRequest(submission_id=submission))
        assert gone.value.code() is grpc.StatusCode.NOT_FOUND
    await client.SubmitJobs(request)
