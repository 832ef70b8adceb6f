"""Wake-ups reach the schedulers that they concern, and these alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis
from redis_cluster import redis_cluster
from redis_failover import Service, redis_nodes
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.connection import Connection, connect
from reltrace_scheduler.queue.signals import Signals
from reltrace_scheduler.tasks import end
from scheduler.fake_worker import FakeWorker


@asynccontextmanager
async def running(redis: Redis) -> AsyncIterator[Signals]:
    signals = Signals(redis)
    task = asyncio.create_task(signals.run())
    try:
        async with signals.listen("first") as first:
            assert await first.wait_and_clear(10)
        yield signals
    finally:
        await end([task])


async def subscribers(redis: Redis, channel: str) -> int:
    return dict(await redis.pubsub_numsub(channel))[channel.encode()]


async def until_unsubscribed(redis: Redis, channel: str) -> None:
    async with asyncio.timeout(10):
        while await subscribers(redis, channel):
            await asyncio.sleep(0.01)


async def test_a_listener_hears_what_comes_after_it(store: Redis) -> None:
    """
    Given many listeners that come and go
    I expect each to hear what is published once it is there, at the first time or not.
    """
    async with running(store) as signals:

        async def listen(number: int) -> None:
            for _ in range(5):
                async with signals.listen(f"a{number % 7}", f"b{number}") as listener:
                    listener.clear()
                    assert await store.publish(f"b{number}", "") == 1
                    assert await listener.wait_and_clear(5)

        await asyncio.gather(*(listen(number) for number in range(50)))
        for channel in ("a0", "b0", "b49"):
            await until_unsubscribed(store, channel)


async def test_only_what_is_listened_to_is_received(store: Redis) -> None:
    async with running(store) as signals, signals.listen("mine") as mine:
        before = signals.count("mine")
        assert await store.publish("other", "") == 0
        assert await store.publish("mine", "") == 1
        assert await mine.wait_and_clear(5)
        assert signals.count("mine") == before + 1
        assert await store.pubsub_numpat() == 0


async def test_a_listener_that_is_cancelled_harms_no_other(store: Redis) -> None:
    async with running(store) as signals, signals.listen("stays") as stays:

        async def listen(number: int) -> None:
            async with signals.listen(f"goes {number}"):
                await asyncio.sleep(60)

        connections = len(await store.client_list(_type="pubsub"))
        tasks = [asyncio.create_task(listen(number)) for number in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert await store.publish("stays", "") == 1
        assert await stays.wait_and_clear(5)
        for number in range(20):
            await until_unsubscribed(store, f"goes {number}")
        assert len(await store.client_list(_type="pubsub")) == connections


async def test_a_lost_connection_is_made_again(store: Redis) -> None:
    async with running(store) as signals, signals.listen("mine") as mine:
        before = signals.count("mine")
        await store.client_kill_filter(_type="pubsub")
        # Something may have been missed.
        assert await mine.wait_and_clear(10)
        assert signals.count("mine") > before
        assert await store.publish("mine", "") == 1
        assert await mine.wait_and_clear(5)


async def test_listeners_do_not_wait_for_a_redis_that_is_away() -> None:
    signals = Signals(Redis.from_url("redis://127.0.0.1:1"))
    task = asyncio.create_task(signals.run())
    async with asyncio.timeout(5), signals.listen("mine") as mine:
        assert not await mine.wait_and_clear(0.01)
    await end([task])


@pytest.mark.slow
async def test_a_server_that_was_demoted_or_is_silent_is_left(tmp_path: Path) -> None:
    """
    Given a service whose address leads from one server to another, as the first one is demoted
    I expect its connection to be to the other, once a script has found the first one read-only.
    If that one answers nothing any more, I expect the same, without anything else.
    """
    with redis_nodes(tmp_path, 3) as (one, two, three), Service(one.port).serving() as service:
        connection = await connect(service.url)
        async with running(connection.redis) as signals, signals.listen("mine") as mine:
            # Another connection to the first server.
            await connection.redis.ping()
            service.target = two.port
            one.follow(two)
            await connection.redis.set("a", 1)
            assert await mine.wait_and_clear(15)
            assert two.admin.publish("mine", "") == 1
            assert await mine.wait_and_clear(5)
            service.target = three.port
            with two.paused():
                assert await mine.wait_and_clear(30)
                assert three.admin.publish("mine", "") == 1
        await connection.redis.aclose()


async def test_a_cluster(settings: Settings) -> None:
    with redis_cluster(2) as nodes:
        connection = await connect(nodes[0].url)
        async with running(connection.redis) as signals, signals.listen("a", "b", "c", "d") as each:
            for channel in "abcd":
                for node in nodes:
                    async with Redis.from_url(node.url) as client:
                        await client.publish(channel, "")
                        assert await each.wait_and_clear(5)
        await connection.redis.aclose()


async def test_the_end_of_a_job_wakes_the_schedulers_concerned(
    store: Redis, redis_url: str, settings: Settings
) -> None:
    """
    Given two schedulers over one Redis, one of which serves a worker and the reader of its results
    If a job is queued and ends, I expect no message to the other one.
    """
    lazy = replace(settings, lease=30.0)
    async with (
        Redis.from_url(redis_url) as one,
        Redis.from_url(redis_url) as other,
        serving(Connection(one, "test"), lazy) as busy,
        serving(Connection(other, "test"), lazy),
        grpc.aio.insecure_channel(busy) as channel,
    ):
        worker = FakeWorker(channel)
        await worker.connect()
        client = trace_pb2_grpc.TraceServiceStub(channel)
        answer = await client.SubmitJobs(
            trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")])
        )
        reading = client.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)
        )
        wake, done = "reltrace:{0}:wake:m", f"reltrace:{{0}}:done:{answer.submission_id}"
        (lease,) = await worker.lease(1)
        async with asyncio.timeout(10):
            while await subscribers(store, done) != 1:
                await asyncio.sleep(0.01)
        assert await subscribers(store, wake) == 1
        assert await subscribers(store, f"reltrace:{{0}}:revoked:{worker.worker_id}") == 1
        assert await store.pubsub_numpat() == 0
        await worker.finish([lease])
        async with asyncio.timeout(10):
            assert [e.entry for m in [await reading.read()] for e in m.events] == [1]
            assert await reading.read() is grpc.aio.EOF
        await until_unsubscribed(store, done)
