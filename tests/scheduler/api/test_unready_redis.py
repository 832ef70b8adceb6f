"""What a scheduler answers while its Redis takes no writes, and that it comes back by itself."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import given
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2
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
