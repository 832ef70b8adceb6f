"""A tenant that submits as fast as it can, whatever it is answered.

    python -m chaos.flood --server ADDRESS --token TOKEN --first N --seconds S

Then it cancels what has not ended, reads how all of it ended, and prints one JSON object:
{"accepted", "refused", "SUCCEEDED", "CANCELLED", "faults"}.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import grpc
from chaos.channels import connect
from chaos.raw_client import PATIENCE
from chaos.standin import Work
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

T = TypeVar("T")

MILLISECONDS = 200
"""Of the pass that one of its jobs is in."""

_JOBS = 256
"""In a submission."""


def flood(client: trace_pb2_grpc.TraceServiceStub, first: int, seconds: float) -> Counter[str]:
    """Submit, cancel, and return how often each thing happened."""
    counts: Counter[str] = Counter()
    accepted: list[trace_pb2.SubmitJobsResponse] = []
    end = time.monotonic() + seconds
    number, unsure = first, False
    while time.monotonic() < end:
        try:
            accepted.append(client.SubmitJobs(_request(number), timeout=5))
            number, unsure = number + _JOBS, False
        except grpc.RpcError as error:
            refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            counts["refused"] += refused
            # Only the answer may have been lost.
            unsure = unsure or not refused
    # One after another: what has ended is kept for a while only.
    for answer in accepted:
        counts += _end(client, answer)
    if unsure:
        accepted.append(_patiently(lambda: client.SubmitJobs(_request(number), timeout=5)))
        counts += _end(client, accepted[-1])
    counts["accepted"] = sum(len(answer.job_ids) for answer in accepted)
    return counts


def _request(number: int) -> trace_pb2.SubmitJobsRequest:
    works = [Work(number + index, milliseconds=MILLISECONDS) for index in range(_JOBS)]
    return trace_pb2.SubmitJobsRequest(
        jobs=[work.spec for work in works], idempotency_key=f"flood-{number}"
    )


def _end(
    client: trace_pb2_grpc.TraceServiceStub, answer: trace_pb2.SubmitJobsResponse
) -> Counter[str]:
    """Cancel a submission, read it and free it; return how its jobs ended."""
    cancel = trace_pb2.CancelJobsRequest(submission_id=answer.submission_id)
    _patiently(lambda: client.CancelJobs(cancel, timeout=5))
    counts = _patiently(lambda: _ends(client, answer))
    acknowledge = trace_pb2.AcknowledgeResultsRequest(
        submission_id=answer.submission_id, through_entry=len(answer.job_ids)
    )
    _patiently(lambda: client.AcknowledgeResults(acknowledge, timeout=5))
    return counts


def _ends(
    client: trace_pb2_grpc.TraceServiceStub, submission: trace_pb2.SubmitJobsResponse
) -> Counter[str]:
    stream = client.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=submission.submission_id), timeout=PATIENCE
    )
    chunks = [event.chunk for message in stream for event in message.events]
    ends = {chunk.job_id: chunk.end.state for chunk in chunks if chunk.HasField("end")}
    counts = Counter(
        types_pb2.JobState.Name(state).removeprefix("JOB_STATE_") for state in ends.values()
    )
    counts["faults"] = len(set(submission.job_ids) ^ set(ends)) + len(chunks) - len(ends)
    return counts


def _patiently(call: Callable[[], T]) -> T:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--token", default="")
    parser.add_argument("--first", type=int, required=True, help="number of the first job")
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    with connect(given.server, given.token) as channel:
        client = trace_pb2_grpc.TraceServiceStub(channel)
        print(json.dumps(flood(client, given.first, given.seconds)))


if __name__ == "__main__":
    main()
