"""Answers that wait for replicas."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from redis_cluster import redis_cluster
from redis_failover import RedisNode, Service, redis_nodes
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import NotReplicatedError
from reltrace_scheduler.queue.connection import connect
from reltrace_scheduler.queue.job_queue import STORED
from scheduler.driver import Driver, end, jobs
from scheduler.fake_worker import FakeWorker


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[RedisNode]]:
    with redis_nodes(tmp_path, 2) as nodes:
        nodes[1].follow(nodes[0])
        yield nodes


@pytest.fixture
def replicated(settings: Settings) -> Settings:
    return replace(settings, redis_replicas=1, lease=30.0)


@pytest.fixture
async def over(pair: list[RedisNode], replicated: Settings) -> AsyncIterator[Driver]:
    connection = await connect(pair[0].url)
    yield Driver.over(connection.redis, replicated)
    await connection.redis.aclose()


def has(node: RedisNode, submission: str) -> bool:
    return bool(node.admin.exists(f"reltrace:{{0}}:submission:{submission}"))


async def test_what_is_answered_for_is_on_the_replica(over: Driver, pair: list[RedisNode]) -> None:
    """
    Given a queue that waits for one replica
    I expect the replica to have each submission and result when the call answers, and each call
    to do once what it does without waiting.
    """
    _, replica = pair
    for number in range(20):
        submitted = await over.submit(jobs(1), str(number))
        assert not submitted.deduplicated
        assert has(replica, submitted.id)
        (job,) = await over.lease("w", 1)
        assert await over.commit("w", [end(job)]) == [STORED]
        assert replica.admin.exists(f"reltrace:{{0}}:results:{submitted.id}")


async def test_a_replica_that_does_not_answer(over: Driver, pair: list[RedisNode]) -> None:
    """
    Given a replica that is paused
    If jobs are submitted I expect an error, also when the call is repeated, although it adds
    nothing then; and once the replica is back, the first answer.
    """
    _, replica = pair
    await over.submit(jobs(1))
    with replica.paused():
        for _ in range(2):
            with pytest.raises(NotReplicatedError, match="only 0 of 1 replicas"):
                await over.submit(jobs(2), "k")
    submitted = await over.submit(jobs(2), "k")
    assert submitted.deduplicated
    assert has(replica, submitted.id)
    assert len(await over.lease("w", 10)) == 3


async def test_a_worker_is_told_once_the_replica_has_its_result(
    pair: list[RedisNode], replicated: Settings
) -> None:
    """
    Given a worker that sends a result while the replica is paused
    I expect its stream to end as of a store that is away; when it sends the result again, with the
    replica back, it is told that it is stored, and the reader has it once.
    """
    primary, replica = pair
    connection = await connect(primary.url)
    async with (
        serving(connection, replicated) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        client = trace_pb2_grpc.TraceServiceStub(channel)
        worker = FakeWorker(channel)
        await worker.connect()
        request = trace_pb2.SubmitJobsRequest(
            idempotency_key="k", jobs=[types_pb2.JobSpec(prompt="a")]
        )
        submitted = await client.SubmitJobs(request)
        leases = await worker.lease(1)
        with replica.paused():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.SubmitJobs(request)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "only 0 of 1 replicas" in str(refused.value.details())
            await worker.finish(leases)
            async with asyncio.timeout(10):
                assert await worker.call.code() is grpc.StatusCode.UNAVAILABLE
        await worker.connect(holding=leases)
        await worker.finish(leases)
        while (await worker.call.read()).WhichOneof("message") != "committed":
            pass
        reading = client.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=submitted.submission_id)
        )
        events = [event async for message in reading for event in message.events]
        assert [event.chunk.job_id for event in events] == list(submitted.job_ids)
    await connection.redis.aclose()


async def test_the_primary_is_demoted(pair: list[RedisNode], replicated: Settings) -> None:
    old, new = pair
    with Service(old.port).serving() as service:
        connection = await connect(service.url)
        driver = Driver.over(connection.redis, replicated)
        await driver.submit(jobs(1))
        new.follow(None)
        service.target = new.port
        old.follow(new)
        submitted = await driver.submit(jobs(1), "k")
        assert not submitted.deduplicated
        assert has(old, submitted.id)
        assert has(new, submitted.id)
        await connection.redis.aclose()


async def test_a_cluster_without_replicas(settings: Settings) -> None:
    """
    Given a cluster whose primaries have no replicas
    I expect submissions that wait for one to fail, each of which is stored nevertheless.
    """
    with redis_cluster(2) as nodes:
        connection = await connect(nodes[0].url)
        some = replace(settings, shards=2, redis_replicas=1)
        driver = Driver.over(connection.redis, some)
        for number in range(2):
            with pytest.raises(NotReplicatedError):
                await driver.submit(jobs(1), str(number))
        seen = await Driver.over(connection.redis, replace(some, redis_replicas=0)).submit(
            jobs(1), "0"
        )
        assert seen.deduplicated
        await connection.redis.aclose()
