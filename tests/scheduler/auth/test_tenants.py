"""A tenant sees, cancels and reads only its own jobs."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2, worker_pb2
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import DEFAULT_TENANT, Role
from reltrace_scheduler.auth.tokens import Tokens, append, make
from scheduler.auth.conftest import Serve
from scheduler.fake_worker import FakeWorker, ended

DEADLINE = 10


class Tenant:
    """Calls of one token's holder."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._stub = trace_pb2_grpc.TraceServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self._stub, method)(request, metadata=self._metadata, timeout=DEADLINE)

    async def submit(self, key: str = "") -> trace_pb2.SubmitJobsResponse:
        jobs = [types_pb2.JobSpec(prompt="p")] * 2
        return await self.call(
            "SubmitJobs", trace_pb2.SubmitJobsRequest(jobs=jobs, idempotency_key=key)
        )

    async def read(self, submission_id: str) -> list[str]:
        call = self._stub.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=submission_id),
            metadata=self._metadata,
            timeout=DEADLINE,
        )
        return [event.chunk.job_id async for message in call for event in message.events]


@pytest.fixture
async def world(serve: Serve, token_file: Path) -> AsyncIterator[tuple[Tenant, Tenant, FakeWorker]]:
    """Two tenants and a worker."""
    made = {}
    roles = {"team-a": Role.CLIENT, "team-b": Role.OPERATOR, DEFAULT_TENANT: Role.WORKER}
    for tenant, role in roles.items():
        made[tenant], entry = make(f"of-{tenant}", role, tenant)
        append(token_file, entry)
    async with (
        serve(Access(tokens=Tokens(token_file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(
            channel, metadata=(("authorization", f"Bearer {made[DEFAULT_TENANT]}"),)
        )
        await worker.connect()
        yield Tenant(channel, made["team-a"]), Tenant(channel, made["team-b"]), worker


World = tuple[Tenant, Tenant, FakeWorker]


async def test_another_tenants_submission_does_not_exist(world: World) -> None:
    owner, stranger, worker = world
    submission = await owner.submit()
    leases = await worker.lease(2)
    await worker.send(
        results=worker_pb2.Results(
            id=1, chunks=[ended(lease.job_id, lease.attempt) for lease in leases]
        )
    )
    await worker.receive("committed")

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stranger.read(submission.submission_id)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    acknowledge = trace_pb2.AcknowledgeResultsRequest(
        submission_id=submission.submission_id, through_entry=2
    )
    await stranger.call("AcknowledgeResults", acknowledge)

    # Nothing was freed: its owner still reads all of it.
    assert sorted(await owner.read(submission.submission_id)) == sorted(submission.job_ids)


async def test_another_tenants_jobs_are_neither_seen_nor_cancelled(world: World) -> None:
    owner, stranger, _ = world
    submission = await owner.submit()
    by_id = trace_pb2.CancelJobsRequest(job_ids=submission.job_ids)
    assert (await stranger.call("CancelJobs", by_id)).cancelled == 0
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stranger.call(
            "CancelJobs", trace_pb2.CancelJobsRequest(submission_id=submission.submission_id)
        )
    assert error.value.code() is grpc.StatusCode.NOT_FOUND

    states = trace_pb2.GetJobsRequest(job_ids=submission.job_ids)
    assert {j.state for j in (await stranger.call("GetJobs", states)).jobs} == {
        types_pb2.JOB_STATE_UNSPECIFIED
    }
    assert {j.state for j in (await owner.call("GetJobs", states)).jobs} == {
        types_pb2.JOB_STATE_QUEUED
    }
    assert (await owner.call("CancelJobs", by_id)).cancelled == 2


async def test_idempotency_keys_of_tenants_do_not_meet(world: World) -> None:
    owner, stranger, _ = world
    first, second = await owner.submit("key"), await stranger.submit("key")
    assert first.submission_id != second.submission_id
    assert not second.deduplicated
    assert (await owner.submit("key")).submission_id == first.submission_id
