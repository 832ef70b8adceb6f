"""What a scheduler answers while its Redis takes no writes, and that it comes back by itself."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import given
from redis_cluster import redis_cluster
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2, worker_pb2
from reltrace_scheduler.api import interceptor
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue import trouble
from reltrace_scheduler.queue.connection import connect
from scheduler.api.test_fuzz import UNARY, WORDS, answer, fuzz, still_works
from scheduler.fake_worker import FakeWorker
from scheduler.messages import messages
from scheduler.redis_states import STATES, RedisStates, failure
from waiting import wait_until_async

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")])


@pytest.fixture
async def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisStates]:
    """A Redis of the test's own, and no line of the log that another test has silenced."""
    monkeypatch.setattr(trouble, "_said", {})
    server = EmbeddedRedis(tmp_path)
    connection = await connect(await server.start())
    yield RedisStates(connection.redis, tmp_path)
    await connection.redis.aclose()
    await server.stop()


@pytest.fixture
async def channel(own: RedisStates, settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    # Apart from the test's own, whose connections the scheduler may drop.
    connection = await connect(f"unix://{own.folder}/redis.sock")
    async with (
        serving(connection, settings) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield channel
    await connection.redis.aclose()


async def failure_of(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.StatusCode, float]:
    """Return the code of a call that fails, and the delay that is sent along."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    status = rpc_status.from_call(failed.value)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    return failed.value.code(), retry.retry_delay.ToTimedelta().total_seconds()


@pytest.mark.parametrize("state", STATES)
async def test_calls_are_put_off_and_come_back(
    own: RedisStates, channel: grpc.aio.Channel, state: str
) -> None:
    """
    Given a scheduler and a worker, and a Redis that comes into a state in which it takes no writes
    I expect calls to get a delay, health to say so, and a few lines in the log without a traceback;
    and, when the state is over, all to go on without a restart.
    """
    client = trace_pb2_grpc.TraceServiceStub(channel)
    health = health_pb2_grpc.HealthStub(channel)

    async def is_serving() -> bool:
        response = await health.Check(health_pb2.HealthCheckRequest())
        return bool(response.status == SERVING)

    async def is_not_serving() -> bool:
        return not await is_serving()

    await FakeWorker(channel).connect()
    await wait_until_async(is_serving, "the scheduler serves")
    await client.SubmitJobs(REQUEST)
    with structlog.testing.capture_logs() as lines:
        await own.enter(state)
        for _ in range(20):
            code, delay = await failure_of(client.SubmitJobs(REQUEST))
            expected = "RESOURCE_EXHAUSTED" if state == "OOM" else "UNAVAILABLE"
            assert code is grpc.StatusCode[expected]
            assert 0 < delay <= 5
        if state == "OOM":
            # A full Redis gives and frees results, which makes room.
            assert await is_serving()
        else:
            await wait_until_async(is_not_serving, "health says so", 20)
    assert not [line for line in lines if "exc_info" in line]
    assert len(lines) <= 12, lines

    await own.leave(state)
    await wait_until_async(is_serving, "the scheduler serves again", 20)
    await client.SubmitJobs(REQUEST)
    await FakeWorker(channel, "w2").connect()


@pytest.mark.parametrize("state", ["OOM", "READONLY"])
async def test_any_request_is_put_off_or_refused(
    own: RedisStates, channel: grpc.aio.Channel, state: str
) -> None:
    """
    Given a worker, and a Redis that is full, or a replica
    If anything is sent to any method
    I expect each answer to be one that a caller can act on, and all to go on afterwards.
    """
    put_off = trouble_code(state)
    await connected(channel)
    await own.enter(state)
    ended = set()
    for path in UNARY:
        sent = await asyncio.to_thread(requests_of, path)
        sent.append(REQUEST.SerializeToString() if path.endswith("SubmitJobs") else b"")
        for request in sent:
            ended.add(await answer(channel, path, request, put_off))
    assert put_off in ended
    await own.leave(state)
    worker = await connected(channel)
    client = trace_pb2_grpc.TraceServiceStub(channel)

    async def takes_jobs() -> bool:
        return await failure(lambda: client.SubmitJobs(REQUEST)) is None

    # The memory of Redis, which bounds the queue, is looked at once in a while.
    await wait_until_async(takes_jobs, "jobs are taken again", 20)
    await still_works(channel, worker)


def requests_of(path: str) -> list[bytes]:
    sent: list[bytes] = []

    @fuzz
    @given(request=messages(UNARY[path].input_type, WORDS))
    def run(request: Any) -> None:
        sent.append(request.SerializeToString())

    run()
    return sent


def trouble_code(state: str) -> grpc.StatusCode:
    full = state == "OOM"
    return grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNAVAILABLE


async def connected(channel: grpc.aio.Channel) -> FakeWorker:
    """Connect a worker when the service takes one again."""
    worker = FakeWorker(channel)

    async def connects() -> bool:
        return await failure(worker.connect) is None

    await wait_until_async(connects, "a worker connects", 20)
    return worker


@pytest.mark.slow
async def test_a_cluster_that_is_down(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Given a Redis Cluster of which one node, or every node, does not answer for some seconds
    I expect the same of a scheduler, and its upkeep to go on when the cluster is whole again.
    """
    monkeypatch.setattr(interceptor, "_DEADLINE", 2.0)
    with redis_cluster(3) as nodes:
        connection = await connect(nodes[0].url)
        async with (
            serving(connection, replace(settings, shards=3, retry_delay=0.5)) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            client = trace_pb2_grpc.TraceServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)

            async def serves() -> bool:
                response = await health.Check(health_pb2.HealthCheckRequest())
                return bool(response.status == SERVING)

            async def is_down() -> bool:
                return not await serves()

            async def goes_on() -> None:
                """A job that fails comes back: by its own shard's upkeep."""
                await wait_until_async(serves, "the scheduler serves", 30)
                worker = FakeWorker(channel)
                await worker.connect()
                for _ in range(6):
                    # Into any of the shards.
                    await client.SubmitJobs(REQUEST)
                    (lease,) = await worker.lease(1)
                    ref = worker_pb2.LeaseRef(job_id=lease.job_id, attempt=lease.attempt)
                    error = types_pb2.JobError(message="again")
                    await worker.send(release=worker_pb2.Release(leases=[ref], error=error))
                    (again,) = await worker.lease(1)
                    assert (again.job_id, again.attempt) == (lease.job_id, 2)
                    await worker.finish([again])
                    await worker.receive("committed")
                await worker.send(leave=worker_pb2.Leave())

            await goes_on()
            for stopped in (nodes[2:], nodes):
                for node in stopped:
                    os.kill(node.pid, signal.SIGSTOP)
                await wait_until_async(is_down, "health says so", 30)
                calls = [client.SubmitJobs(REQUEST, timeout=30) for _ in range(4)]
                codes = {(await failure_of(call))[0] for call in calls}
                assert codes == {grpc.StatusCode.UNAVAILABLE}
                for node in stopped:
                    os.kill(node.pid, signal.SIGCONT)
                await goes_on()
        await connection.redis.aclose()
