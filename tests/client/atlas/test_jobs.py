"""Slices on the server: those that an earlier run left, and how many are read at once."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import reltrace
from fake_results import failed_chunk
from fake_server import FakeServer, code_pb2, status_with
from reltrace.atlas.jobs import BuiltShard, PrefetchLimit, SliceJobs
from reltrace.atlas.settings import AtlasSettings
from reltrace.calls.pinning import Pins
from reltrace_proto.v1 import types_pb2

SETTINGS = AtlasSettings(None, "attnlrp", "max", 2, 9, "batch")
JOB = SETTINGS.job(["My cats love to play"])


def atlas_chunk(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
    chunk = types_pb2.ResultChunk(job_id=job_id, number=1)
    chunk.header.tokens.append("cats")
    chunk.header.token_ids.append(5)
    chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
    return [chunk]


async def make(server: FakeServer, identity: str = "one") -> BuiltShard:
    async with reltrace.AsyncClient(server.address) as client:
        jobs = SliceJobs(client._connection, identity, SETTINGS, Pins(client._connection))
        async with jobs.build(0, "digest", JOB) as found:
            return found


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    server.run = atlas_chunk
    return server


async def test_a_result_stays_until_it_is_freed(server: FakeServer) -> None:
    made = await make(server)
    assert made.shard.vocabulary == {5: "cats"}
    assert (server.acknowledged, server.cancelled) == ({}, [])
    assert (await make(server)).submission.id == made.submission.id
    assert (await make(server, "two")).submission.id != made.submission.id


async def test_a_job_that_was_cancelled_is_submitted_again(server: FakeServer) -> None:
    """
    Given a job of an earlier run that was cancelled, by that run or by hand
    I expect another one, which is found again, and the first to be freed.
    """
    await make(server)
    server.ended["s0-0"] = types_pb2.JOB_STATE_CANCELLED
    assert (await make(server)).submission.id == "s1"
    assert server.acknowledged == {"s0": 1}
    assert (await make(server)).submission.id == "s1"


async def test_a_job_that_failed_is_submitted_again_by_the_next_run_only(
    server: FakeServer,
) -> None:
    def fail(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        failed = types_pb2.JOB_STATE_FAILED
        return [failed_chunk(job_id, failed, code_pb2.INTERNAL, "out of memory")]

    server.run = fail
    with pytest.raises(reltrace.JobFailed, match="out of memory"):
        await make(server)
    assert list(server.submissions) == ["s0"]
    with pytest.raises(reltrace.JobFailed, match="out of memory"):
        await make(server)
    assert list(server.submissions) == ["s0", "s1"]
    server.run = atlas_chunk
    assert (await make(server)).submission.id == "s2"


async def test_results_that_expired_are_computed_again(server: FakeServer) -> None:
    await make(server)
    gone = status_with(grpc.StatusCode.NOT_FOUND, "the submission is not known here")
    server.stream_errors.append(gone)
    assert (await make(server)).submission.id == "s1"
    # If the run's own job is gone again and again it is an error.
    server.stream_errors += [gone] * 4
    with pytest.raises(reltrace.NotFound):
        await make(server, "two")


async def test_a_server_that_refuses_ends_it(server: FakeServer) -> None:
    server.faults = lambda spec: [("top_k", "must be less")]
    with pytest.raises(reltrace.InvalidArgument, match="top_k: must be less"):
        await make(server)
    assert len(server.requests) == 1


def in_two_chunks(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
    [whole] = atlas_chunk(spec, job_id)
    first = types_pb2.ResultChunk(job_id=job_id, number=1, header=whole.header)
    return [first, types_pb2.ResultChunk(job_id=job_id, number=2, end=whole.end)]


async def test_two_results_are_read_until_one_of_them_is_merged(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given three slices whose results do not fit one message
    If none of them is merged
    I expect two to be read; the third is read once one of them is merged.
    """
    server.run = in_two_chunks
    measure = PrefetchLimit.measure
    # As large as those of a large model.
    monkeypatch.setattr(PrefetchLimit, "measure", lambda limit, size: measure(limit, 613 << 20))
    read, merge = asyncio.Queue[int](), [asyncio.Event() for _ in range(3)]

    async with reltrace.AsyncClient(server.address) as client:
        jobs = SliceJobs(client._connection, "one", SETTINGS, Pins(client._connection))

        async def merged(number: int) -> None:
            async with jobs.build(number, "digest", JOB):
                read.put_nowait(number)
                await merge[number].wait()

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(merged(number))
            first, second = await read.get(), await read.get()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read.get(), 0.5)
            merge[second].set()
            assert await read.get() == ({0, 1, 2} - {first, second}).pop()
            for event in merge:
                event.set()
