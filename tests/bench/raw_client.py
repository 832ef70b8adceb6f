"""Tiny jobs by the bare stubs: what the protocol costs without the SDK's checks and arrays."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import grpc.aio
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

_BATCH = 256
_OPEN = 4
"""Submissions under way at a time."""

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
]


def _specs(model: str, count: int) -> list[types_pb2.JobSpec]:
    spec = types_pb2.JobSpec(model=model, sites=["resid"], reduction="token", rule="attnlrp")
    spec.input_ids.ids.extend([1, 2, 3, 4])
    spec.targets.add()
    return [spec] * count


async def _submit(
    stub: trace_pb2_grpc.TraceServiceAsyncStub, model: str, count: int
) -> trace_pb2.SubmitJobsResponse:
    request = trace_pb2.SubmitJobsRequest(
        idempotency_key=str(uuid.uuid4()), jobs=_specs(model, count)
    )
    return await stub.SubmitJobs(request, timeout=60)


async def _fetch(
    stub: trace_pb2_grpc.TraceServiceAsyncStub, submitted: trace_pb2.SubmitJobsResponse
) -> int:
    """Read all results of a submission and acknowledge them; return how many there were."""
    missing = set(submitted.job_ids)
    call = stub.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=submitted.submission_id), timeout=120
    )
    entry = 0
    async for response in call:
        for event in response.events:
            if event.chunk.end.state != types_pb2.JOB_STATE_SUCCEEDED:
                raise RuntimeError(f"job {event.chunk.job_id}: {event.chunk.end}")
            missing.remove(event.chunk.job_id)
            entry = event.entry
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(submitted.job_ids)} results did not come")
    await stub.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(
            submission_id=submitted.submission_id, through_entry=entry
        ),
        timeout=60,
    )
    return len(submitted.job_ids)


async def _in_batches(address: str, model: str, jobs: int, fetch: bool) -> None:
    slots = asyncio.Semaphore(_OPEN)
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        stub = trace_pb2_grpc.TraceServiceStub(channel)

        async def batch(count: int) -> int:
            async with slots:
                submitted = await _submit(stub, model, count)
                return await _fetch(stub, submitted) if fetch else len(submitted.job_ids)

        counts = [min(_BATCH, jobs - start) for start in range(0, jobs, _BATCH)]
        done = await asyncio.gather(*map(batch, counts))
    if sum(done) != jobs:
        raise RuntimeError(f"{sum(done)} of {jobs} jobs came through")


def through(address: str, jobs: int) -> None:
    """Bring tiny jobs to their results."""
    asyncio.run(_in_batches(address, "tiny", jobs, fetch=True))


def submit_only(address: str, jobs: int) -> None:
    """Hand jobs in that nobody works on."""
    asyncio.run(_in_batches(address, "parked", jobs, fetch=False))
