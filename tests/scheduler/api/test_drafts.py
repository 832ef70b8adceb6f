"""Texts for those who read along, from the worker to the reader."""

import asyncio

import grpc
import pytest
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from scheduler.fake_worker import FakeWorker
from scheduler.trace_calls import JobSpec, collect, fields, submission


def draft(lease: worker_pb2.Lease, first: int, *ids: int) -> types_pb2.Draft:
    tokens = [str(token) for token in ids]
    return types_pb2.Draft(
        job_id=lease.job_id, attempt=lease.attempt, first=first, token_ids=ids, tokens=tokens,
        text="".join(tokens),
    )  # fmt: skip


async def test_who_reads_along_gets_drafts_before_the_result(client, worker: FakeWorker) -> None:
    """
    Given a job whose worker sends drafts
    If its results are read with its drafts, and by somebody else without
    I expect the drafts in order and then the result, and nothing but the result; and the drafts
    from the first on for who connects again.
    """
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a")))
    (job_id,) = answer.job_ids
    (lease,) = await worker.lease(1)
    request = trace_pb2.StreamResultsRequest(submission_id=answer.submission_id, drafts_of=[job_id])
    reading = client.StreamResults(request)
    async with asyncio.timeout(20):
        for first, ids in ((0, (7,)), (1, (8, 9))):
            sent = draft(lease, first, *ids)
            await worker.send(drafts=worker_pb2.Drafts(drafts=[sent]))
            message = await reading.read()
            assert list(message.drafts) == [sent]
            assert not message.events
        again = await client.StreamResults(request).read()
        assert [list(one.token_ids) for one in again.drafts] == [[7], [8, 9]]
        await worker.finish([lease])
        (event,) = (await reading.read()).events
        assert event.chunk.job_id == job_id
        assert await reading.read() is grpc.aio.EOF
    assert len(await collect(client, answer.submission_id)) == 1


async def test_who_reads_late_gets_all_drafts_in_messages_of_bounded_size(
    client, worker: FakeWorker
) -> None:
    """
    Given more drafts of some jobs than one message may hold
    If somebody comes to read them
    I expect each of them once, in order, in several messages.
    """
    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 8))
    leases = await worker.lease(8)
    sent = []
    for lease in leases:
        own = [draft(lease, first, first) for first in range(4)]
        for one in own:
            one.text = "x" * 200_000
        await worker.send(drafts=worker_pb2.Drafts(drafts=own))
        sent += own
    # Messages of a worker are handled in order: once this one is answered, all are there.
    await worker.finish(leases[:1])
    await worker.receive("committed")
    sizes, found = [], []
    reading = client.StreamResults(
        trace_pb2.StreamResultsRequest(
            submission_id=answer.submission_id, after_entry=1, drafts_of=answer.job_ids[1:]
        )
    )
    async with asyncio.timeout(20):
        while len(found) < len(sent) - 4:
            message = await reading.read()
            sizes.append(message.ByteSize())
            found += message.drafts
    reading.cancel()
    assert found == [one for one in sent if one.job_id != answer.job_ids[0]]
    assert max(sizes) < 1.1 * 2**20


async def test_drafts_of_other_submissions_are_refused(client, worker: FakeWorker) -> None:
    mine = await client.SubmitJobs(submission(JobSpec(prompt="a")))
    other = await client.SubmitJobs(submission(JobSpec(prompt="b")))
    for drafts_of, field in (
        ([*mine.job_ids, *other.job_ids], "drafts_of[1]"),
        (["nonsense"], "drafts_of[0]"),
        (list(mine.job_ids) * 17, "drafts_of"),
    ):
        request = trace_pb2.StreamResultsRequest(
            submission_id=mine.submission_id, drafts_of=drafts_of
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.StreamResults(request).read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields(error.value) == [field]
