"""A worker of a scheduler whose Redis is full: it keeps its results, and its leases."""

from collections.abc import AsyncIterator

import grpc
import pytest
import redis.asyncio
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.config import Settings
from scheduler.fake_worker import FakeWorker
from scheduler.redis_states import fill, make_room
from scheduler.trace_calls import collect

REQUEST = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")] * 4)


@pytest.fixture
async def full(store: redis.asyncio.Redis) -> AsyncIterator:
    async def full(is_full: bool) -> None:
        await (fill if is_full else make_room)(store)

    yield full
    await full(False)


@pytest.fixture
def settings() -> Settings:
    return Settings(listen="127.0.0.1:0", lease=60)


@pytest.fixture(autouse=True)
async def memory(store: redis.asyncio.Redis, request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Redis' `maxmemory`, from before the scheduler starts; 0: no bound."""
    await store.config_set("maxmemory", getattr(request, "param", 0))
    yield
    await store.config_set("maxmemory", 0)


async def beat(worker: FakeWorker, leases: list[worker_pb2.Lease]) -> None:
    refs = [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]
    await worker.send(heartbeat=worker_pb2.Heartbeat(leases=refs))


async def test_results_wait_until_there_is_room(
    client, channel: grpc.aio.Channel, worker: FakeWorker, full
) -> None:
    """
    Given a worker with results in several messages, and a Redis that becomes full
    I expect it to be told to keep all of them, with growing delays, and its leases to stay its own
    (a worker that connects meanwhile gets jobs too); and, when there is room, all to be stored.
    """
    submitted = await client.SubmitJobs(REQUEST)
    leases = await worker.lease(3)
    await full(True)

    first = leases[0]
    part = types_pb2.ResultChunk(job_id=first.job_id, number=1)
    chunks = [worker_pb2.LeasedChunk(attempt=1, chunk=part)]
    await worker.send(results=worker_pb2.Results(id=1, chunks=chunks))
    await worker.finish([first], number=2, message=2)
    await worker.finish(leases[1:], message=3)
    delays = []
    for number in (1, 2, 3):
        deferred = (await worker.receive("deferred")).deferred
        assert deferred.id == number
        delays.append(deferred.delay.ToTimedelta().total_seconds())
    assert delays == [1, 1, 1]
    await worker.send(results=worker_pb2.Results(id=1, chunks=chunks))
    assert (await worker.receive("deferred")).deferred.delay.ToTimedelta().total_seconds() == 2
    # None of this needs memory that is not there, or ends the stream.
    draft = types_pb2.Draft(job_id=first.job_id, attempt=1, token_ids=[1], tokens=["a"])
    await worker.send(drafts=worker_pb2.Drafts(drafts=[draft]))
    await beat(worker, leases)
    other = FakeWorker(channel, "w2")
    await other.connect()
    (last,) = await other.lease(1)
    await other.send(
        release=worker_pb2.Release(
            leases=[worker_pb2.LeaseRef(job_id=last.job_id, attempt=last.attempt)]
        )
    )

    # There is room before the first of them comes again.
    await full(False)
    await worker.finish([first], number=2, message=2)
    assert (await worker.receive("deferred")).deferred.id == 2
    await worker.send(results=worker_pb2.Results(id=1, chunks=chunks))
    assert (await worker.receive("committed")).committed.id == 1
    await worker.finish([first], number=2, message=2)
    assert (await worker.receive("committed")).committed.id == 2
    await worker.finish(leases[1:], message=3)
    assert (await worker.receive("committed")).committed.id == 3
    (last,) = await other.lease(1)
    await other.finish([last])
    events = await collect(client, submitted.submission_id)
    ended = [event.chunk.end.state for event in events if event.chunk.HasField("end")]
    assert ended == [types_pb2.JOB_STATE_SUCCEEDED] * 4


async def test_a_worker_that_can_not_wait_gets_the_error(
    client, channel: grpc.aio.Channel, full
) -> None:
    worker = FakeWorker(channel, "old", protocol=0)
    await worker.connect()
    await client.SubmitJobs(REQUEST)
    leases = await worker.lease(1)
    await full(True)
    await worker.finish(leases)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await worker.call.read()
    assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("memory", [6 << 20], indirect=True)
async def test_many_small_jobs_leave_room_for_their_results(client, worker: FakeWorker) -> None:
    """
    Given more small jobs than Redis has memory for: each takes more than the bytes that are counted
    I expect further ones to be refused while there is room for the results of those accepted.
    """

    async def submit(key: int) -> trace_pb2.SubmitJobsResponse:
        return await client.SubmitJobs(
            trace_pb2.SubmitJobsRequest(
                jobs=[types_pb2.JobSpec(prompt="a")] * 256, idempotency_key=str(key)
            )
        )

    submitted: list[trace_pb2.SubmitJobsResponse] = []
    error: grpc.aio.AioRpcError | None = None
    while error is None and len(submitted) < 100:
        try:
            submitted.append(await submit(len(submitted)))
        except grpc.aio.AioRpcError as refused:
            error = refused
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the job store is full" in (error.details() or "")
    assert len(submitted) > 4
    # What was accepted is known by its key.
    assert (await submit(0)).submission_id == submitted[0].submission_id
    ended = 0
    while ended < 256 * len(submitted):
        leases = await worker.lease(64)
        await worker.finish(leases)
        await worker.receive("committed")
        ended += len(leases)
