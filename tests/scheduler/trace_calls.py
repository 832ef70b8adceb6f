"""Calls of the trace service, and what came of them."""

import asyncio

import grpc
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status
from reltrace_proto.v1 import trace_pb2, types_pb2

JobSpec = types_pb2.JobSpec


def submission(*jobs: JobSpec, key: str = "") -> trace_pb2.SubmitJobsRequest:
    return trace_pb2.SubmitJobsRequest(jobs=jobs, idempotency_key=key)


def details(error: grpc.aio.AioRpcError, kind: type) -> list:
    """Details of a status that are of one kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    found = []
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


def fields(error: grpc.aio.AioRpcError) -> list[str]:
    return [v.field for bad in details(error, BadRequest) for v in bad.field_violations]


async def collect(client, submission_id: str, after: int = 0, chunk: int = 0) -> list:
    request = trace_pb2.StreamResultsRequest(
        submission_id=submission_id, after_entry=after, after_chunk=chunk
    )
    async with asyncio.timeout(20):
        return [
            event async for message in client.StreamResults(request) for event in message.events
        ]
