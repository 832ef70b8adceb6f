"""The queue over a real Redis Cluster of three nodes: every shard is in one slot."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import grpc
import pytest
from redis.asyncio.cluster import RedisCluster
from redis_cluster import redis_cluster
from reltrace_proto.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
    types_pb2,
    worker_pb2,
)
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.keys import partition, shard_of, submission_of
from reltrace_scheduler.queue.connection import Connection, connect
from reltrace_scheduler.queue.store import Store
from scheduler.fake_worker import FakeWorker

NODES, SHARDS = 3, 8


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    with redis_cluster(NODES) as nodes:
        yield nodes[0].url


@pytest.fixture
async def connection(cluster_url: str) -> AsyncIterator[Connection]:
    connection = await connect(cluster_url)
    await connection.redis.flushall(target_nodes=RedisCluster.PRIMARIES)
    yield connection
    await connection.redis.aclose()


@pytest.fixture
def sharded(settings: Settings) -> Settings:
    return replace(settings, shards=SHARDS, max_jobs=8000, tenant_max_jobs=8000, lease=5.0)


async def nodes_of(connection: Connection, shards: int) -> Counter[str]:
    """Count the shards that each node has."""
    cluster = connection.redis
    assert isinstance(cluster, RedisCluster)
    nodes = [cluster.get_node_from_key(keys("virtual_time")) for keys in partition(shards)]
    return Counter(node.name for node in nodes if node is not None)


async def test_jobs_of_all_shards_run_once(connection: Connection, sharded: Settings) -> None:
    """
    Given a scheduler over a cluster whose nodes all have some of eight shards
    If forty submissions are run by two workers, one of which vanishes with its leases
    I expect every job to end once, on whatever node it is, and sums over all of them.
    """
    held = await nodes_of(connection, SHARDS)
    assert sorted(held.values()) == [2, 3, 3]
    async with (
        serving(connection, sharded) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        client = trace_pb2_grpc.TraceServiceStub(channel)
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        lost, worker = FakeWorker(channel, worker_id="lost"), FakeWorker(channel)
        await lost.connect()
        await worker.connect()
        submissions = []
        for number in range(40):
            jobs = [types_pb2.JobSpec(prompt=f"{number} {index}") for index in range(5)]
            request = trace_pb2.SubmitJobsRequest(idempotency_key=f"key {number}", jobs=jobs)
            first, again = await client.SubmitJobs(request), await client.SubmitJobs(request)
            assert (again.deduplicated, list(again.job_ids)) == (True, list(first.job_ids))
            submissions.append(first)
        shards = Counter(shard_of(s.submission_id) for s in submissions)
        assert set(shards) == set(range(SHARDS))
        status = await admin.GetStatus(admin_pb2.GetStatusRequest())
        assert [(q.model, q.queued) for q in status.queues] == [("m", 200)]

        # Its stream is cut: what it holds is leased again, to a worker that holds nothing else.
        assert len(await lost.lease(20)) >= 20
        lost.call.cancel()
        leased: list[str] = []
        async with asyncio.timeout(60):
            while len(leased) < 200:
                leases = await worker.lease(1)
                leased += [lease.job_id for lease in leases]
                await worker.finish(leases)
                await worker.receive("committed")
        assert sorted(leased) == sorted(job for s in submissions for job in s.job_ids)
        for submission in submissions:
            events = [
                event
                async for message in client.StreamResults(
                    trace_pb2.StreamResultsRequest(submission_id=submission.submission_id)
                )
                for event in message.events
            ]
            assert sorted(e.chunk.job_id for e in events) == sorted(submission.job_ids)
            await client.AcknowledgeResults(
                trace_pb2.AcknowledgeResultsRequest(
                    submission_id=submission.submission_id, through_entry=5
                )
            )
        status = await admin.GetStatus(admin_pb2.GetStatusRequest())
        assert dict(status.ended) == {"SUCCEEDED": 200}
        assert status.redis_memory_bytes > 1e6
    # Nothing is left of the jobs, wherever they were.
    keys = [key.decode() async for key in connection.redis.scan_iter(match="reltrace:{*")]
    kinds = {key.split(":")[2] for key in keys}
    assert kinds.isdisjoint({"job", "results", "submission", "held", "chunks"}), kinds


async def test_a_shard_is_one_slot(connection: Connection, sharded: Settings) -> None:
    async with (
        serving(connection, sharded) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(channel)
        await worker.connect()
        jobs = [types_pb2.JobSpec(prompt="a")]
        client = trace_pb2_grpc.TraceServiceStub(channel)
        answer = await client.SubmitJobs(
            trace_pb2.SubmitJobsRequest(idempotency_key="k", jobs=jobs)
        )
        (lease,) = await worker.lease(1)
        draft = types_pb2.Draft(job_id=lease.job_id, attempt=1, token_ids=[7], tokens=["x"])
        await worker.send(drafts=worker_pb2.Drafts(drafts=[draft]))
        reading = client.StreamResults(
            trace_pb2.StreamResultsRequest(
                submission_id=answer.submission_id, drafts_of=answer.job_ids
            )
        )
        async with asyncio.timeout(10):
            assert list((await reading.read()).drafts) == [draft]
        cluster = connection.redis
        assert isinstance(cluster, RedisCluster)
        keys = [key.decode() async for key in cluster.scan_iter(match="reltrace:{*")]
        slots: dict[str, set[int]] = {}
        for key in keys:
            slots.setdefault(key.partition("}")[0], set()).add(cluster.keyslot(key))
        assert all(len(found) == 1 for found in slots.values()), slots
        home = partition(SHARDS)[shard_of(answer.submission_id)]
        assert home("submission", submission_of(answer.job_ids[0])) in keys
        assert home("draft", answer.job_ids[0]) in keys


async def test_schedulers_must_agree_on_the_shards(
    connection: Connection, sharded: Settings
) -> None:
    await Store(connection.redis, sharded).open()
    await Store(connection.redis, sharded).open()
    with pytest.raises(StartError, match="--shards 2: the queue in this Redis has 8"):
        await Store(connection.redis, replace(sharded, shards=2)).open()
