import asyncio

import grpc
import pytest
import redis.asyncio
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.queue.results import Results
from scheduler.fake_worker import MODEL, FakeWorker, ended
from scheduler.trace_calls import JobSpec, collect, fields, submission


async def test_a_job_from_submission_to_acknowledgement(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    leases = await worker.lease(2)
    assert [lease.spec.prompt for lease in leases] == ["a", "b"]
    assert {lease.spec.model for lease in leases} == {"m"}
    await worker.finish(leases, b"data")

    events = await collect(client, answer.submission_id)

    assert [event.entry for event in events] == [1, 2]
    assert [event.chunk.job_id for event in events] == list(answer.job_ids)
    assert {event.chunk.tensors[0].data for event in events} == {b"data"}
    assert await collect(client, answer.submission_id) == events
    await client.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(submission_id=answer.submission_id, through_entry=2)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(client, answer.submission_id)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert fields(caught.value) == ["submission_id"]


@pytest.mark.parametrize("left", [0, 1])
async def test_a_result_that_redis_loses_while_it_is_read(
    client, worker: FakeWorker, store: redis.asyncio.Redis, left: int
) -> None:
    """
    Given a result of two chunks, of which there are fewer, as after a replica took over
    I expect no other to be given in its place, and the reader to be told to read again.
    """
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    first, second = await worker.lease(2)
    begun = ended(first.job_id, first.attempt, bytes(100_000))
    begun.chunk.ClearField("end")
    await worker.send(results=worker_pb2.Results(id=1, chunks=[begun]))
    await worker.finish([first], bytes(100_000), number=2)
    await worker.finish([second], b"data", message=8)
    assert len(await collect(client, answer.submission_id)) == 3
    (chunks,) = await store.keys("*:chunks:*")
    await store.ltrim(chunks, 0, left - 1) if left else await store.delete(chunks)

    with pytest.raises(grpc.aio.AioRpcError, match="entry 1 is not there any more") as lost:
        await collect(client, answer.submission_id)
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
    request = trace_pb2.StreamResultsRequest(submission_id=answer.submission_id, after_entry=1)
    events = [event async for message in client.StreamResults(request) for event in message.events]
    assert [event.entry for event in events] == [2]


async def test_results_are_streamed_as_they_come(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    first, second = await worker.lease(2)
    stream = client.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)
    )
    await worker.finish([second])
    async with asyncio.timeout(10):
        assert (await stream.read()).events[0].chunk.job_id == second.job_id
        await worker.finish([first])
        assert (await stream.read()).events[0].chunk.job_id == first.job_id
        assert await stream.read() is grpc.aio.EOF


async def test_a_result_that_a_reader_waits_for_is_not_read_back(
    client, worker: FakeWorker, store: redis.asyncio.Redis
) -> None:
    """
    Given a reader that has a small result, and waits for one of 3 MB in ten messages
    I expect the reader to get all of it, and Redis to be asked for the end of it at most.
    """
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    first, second = await worker.lease(2)
    stream = client.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)
    )
    async with asyncio.timeout(20):
        await worker.finish([first], message=1)
        assert (await stream.read()).events[0].chunk.job_id == first.job_id
        before = (await store.info("stats"))["total_net_output_bytes"]
        for number in range(1, 11):
            leased = ended(second.job_id, second.attempt, bytes([number]) * 300_000, number)
            if number < 10:
                leased.chunk.ClearField("end")
            await worker.send(results=worker_pb2.Results(id=1 + number, chunks=[leased]))
        chunks: list[types_pb2.ResultChunk] = []
        while (message := await stream.read()) is not grpc.aio.EOF:
            chunks += [event.chunk for event in message.events]
    assert [chunk.number for chunk in chunks] == list(range(1, 11))
    assert all(c.tensors[0].data == bytes([c.number]) * 300_000 for c in chunks)
    # The word that it has ended may come before the answer for its last chunk.
    after = (await store.info("stats"))["total_net_output_bytes"]
    assert after - before < 600_000


async def test_a_stream_goes_on_after_the_last_chunk_seen(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 5))
    await worker.finish(await worker.lease(5), bytes(600_000))
    whole = await collect(client, answer.submission_id)
    for after in range(5):
        assert await collect(client, answer.submission_id, after) == whole[after:]
    assert await collect(client, answer.submission_id, 2, 1) == whole[3:]


async def test_a_stream_from_what_was_acknowledged_waits_for_the_rest(
    client, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a submission of which one result was acknowledged, and another is to come
    If its stream is read from the beginning, or behind the only chunk of what was acknowledged
    I expect it to wait, and not to look again and again; and then to give what comes, once.
    """
    looks = []
    progress = Results.progress

    async def counted(results: Results, submission_id: str) -> object:
        looks.append(submission_id)
        return await progress(results, submission_id)

    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 3))
    first, second, third = await worker.lease(3)
    await worker.finish([first, second], b"data")
    await worker.receive("committed")
    await client.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(submission_id=answer.submission_id, through_entry=1)
    )
    other = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 2))
    gone, open_ = await worker.lease(2)
    await worker.finish([gone], b"data")
    await worker.receive("committed")
    await client.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(submission_id=other.submission_id, through_entry=1)
    )
    monkeypatch.setattr(Results, "progress", counted)
    readers = [
        asyncio.create_task(collect(client, answer.submission_id, *position))
        for position in ((0, 0), (1, 0), (1, 1))
    ]
    readers.append(asyncio.create_task(collect(client, other.submission_id)))
    for _ in range(50):
        await client.GetJobs(trace_pb2.GetJobsRequest(job_ids=answer.job_ids))
    assert len(looks) < 60
    await worker.finish([third, open_], b"data")
    found = [[event.entry for event in await reader] for reader in readers]
    assert found == [[2, 3], [2, 3], [3], [2]]


async def test_states_of_jobs(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    await worker.lease(1)
    jobs = (await client.GetJobs(trace_pb2.GetJobsRequest(job_ids=[*answer.job_ids, "none"]))).jobs
    assert [(job.state, job.worker_id) for job in jobs] == [
        (types_pb2.JOB_STATE_LEASED, "w1"),
        (types_pb2.JOB_STATE_QUEUED, ""),
        (types_pb2.JOB_STATE_UNSPECIFIED, ""),
    ]


async def test_models_and_their_workers(client, channel, worker: FakeWorker) -> None:
    await FakeWorker(channel, "w2").connect()
    (served,) = (await client.ListModels(trace_pb2.ListModelsRequest())).models
    assert served.model == MODEL
    assert served.workers == 2
