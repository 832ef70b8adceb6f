"""Errors of a real Redis, however redis-py words them, are known by the state that they tell of."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import redis
from redis.asyncio import Redis
from reltrace_scheduler.errors import SchedulerError
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue.trouble import answer_to, trouble_of
from scheduler.redis_states import STATES, RedisStates, failure


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[RedisStates]:
    server = EmbeddedRedis(tmp_path)
    async with Redis.from_url(await server.start()) as client:
        yield RedisStates(client, tmp_path)
    await server.stop()


@pytest.mark.parametrize("state", STATES)
async def test_every_kind_of_call_tells_the_state(own: RedisStates, state: str) -> None:
    client = own.client
    script = client.register_script("return redis.call('SET', KEYS[1], 'x')")

    async def pipeline(transaction: bool) -> None:
        async with client.pipeline(transaction=transaction) as pipe:
            pipe.set("a key", "text of a caller: -OOM 'BUSY")
            pipe.get("a key")
            await pipe.execute()

    calls = {
        "command": lambda: client.set("a key", "x"),
        "script": lambda: script(keys=["a key"]),
        "pipeline": lambda: pipeline(False),
        "transaction": lambda: pipeline(True),
    }
    await script(keys=["a key"])
    await own.enter(state)

    for name, call in calls.items():
        error = await failure(call)
        assert error is not None, name
        # A replica says READONLY to one command and MASTERDOWN to another.
        expected = ("READONLY", "MASTERDOWN") if state == "MASTERDOWN" else (state,)
        assert trouble_of(error) in expected, (name, error)
        answer = answer_to(error)
        assert isinstance(answer, SchedulerError)
        code = "RESOURCE_EXHAUSTED" if state == "OOM" else "UNAVAILABLE"
        assert answer.code is grpc.StatusCode[code]
        assert answer.retry_after
        assert "text of a caller" not in answer.message

    await own.leave(state)
    for name, call in calls.items():
        assert await failure(call) is None, name


async def test_redis_is_away(tmp_path: Path) -> None:
    async with Redis(unix_socket_path=str(tmp_path / "nobody")) as client:
        error = await failure(client.ping)
    assert error is not None
    answer = answer_to(error)
    assert answer is not None
    assert answer.code is grpc.StatusCode.UNAVAILABLE


async def test_an_error_of_another_kind_is_no_state_of_redis(own: RedisStates) -> None:
    await own.client.set("text", "-OOM 'BUSY")
    error = await failure(lambda: own.client.hget("text", "-OOM 'BUSY"))
    assert isinstance(error, redis.ResponseError)
    assert answer_to(error) is None
    assert answer_to(ValueError("OOM")) is None
