"""Redis' clock alone decides which workers are alive."""

import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
import redis.asyncio
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, trace_pb2, trace_pb2_grpc, types_pb2
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from scheduler.fake_worker import FakeWorker
from waiting import wait_until_async

AHEAD = 301
PROGRAM = """
import time
right = time.time
time.time = lambda: right() + float({ahead})
from reltrace_scheduler.__main__ import main
main()
"""


@pytest.fixture
def settings() -> Settings:
    # A worker is forgotten after ten times as long.
    return Settings(listen="127.0.0.1:0", lease=2)


@pytest.fixture(params=[AHEAD, -AHEAD], ids=["ahead", "behind"])
def other(request: pytest.FixtureRequest, server: str, redis_url: str) -> Iterator[str]:
    """A second scheduler, whose own clock is wrong; gives its address."""
    command = [
        sys.executable, "-c", PROGRAM.format(ahead=request.param),
        "--redis", redis_url, "--listen", "127.0.0.1:0", "--lease", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.kill()
    process.communicate(timeout=10)


async def test_a_scheduler_with_a_wrong_clock_forgets_no_worker(
    channel: grpc.aio.Channel, other: str, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given two schedulers, one with a clock that is 301 s wrong, and a worker at each
    I expect both to count both, and jobs to be leased to both without a session being superseded;
    and a worker that is gone to be forgotten after ten lease times, neither sooner nor later.
    """
    async with grpc.aio.insecure_channel(other) as wrong:
        workers = [FakeWorker(channel, "right"), FakeWorker(wrong, "wrong")]
        for worker in workers:
            await worker.connect()
        seconds, _ = await store.time()
        await store.zadd(keys("workers"), {"gone for 21 s": seconds - 21, "for 4 s": seconds - 4})

        async def is_forgotten() -> bool:
            return await store.zscore(keys("workers"), "gone for 21 s") is None

        await wait_until_async(is_forgotten, "the worker that is gone is forgotten", 20)
        client = trace_pb2_grpc.TraceServiceStub(wrong)
        for _ in range(8):
            await client.SubmitJobs(
                trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="p")] * 2)
            )
            for worker in workers:
                # Fails where another session took the worker's place.
                leases = await worker.lease(1)
                await worker.finish(leases)
                await worker.receive("committed")
        for each in (channel, wrong):
            listed = await admin_pb2_grpc.AdminServiceStub(each).ListWorkers(
                admin_pb2.ListWorkersRequest()
            )
            assert {worker.worker_id for worker in listed.workers} == {"right", "wrong"}
            models = await trace_pb2_grpc.TraceServiceStub(each).ListModels(
                trace_pb2.ListModelsRequest()
            )
            assert [model.workers for model in models.models] == [2]
        assert await store.zscore(keys("workers"), "for 4 s") is not None
        members = await store.zrange(keys("workers"), 0, -1, withscores=True)
        now, _ = await store.time()
        assert all(seen <= now + 1 for _, seen in members)
