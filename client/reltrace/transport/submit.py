"""Submits jobs: once, however often the call has to be repeated."""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.transport.retry import TRANSIENT, Deadline
from reltrace.transport.servers import Method, Server
from reltrace.transport.status import RpcStatus, from_rejection, from_status
from reltrace.types.errors import ProtocolError, TraceError
from reltrace.types.request import Job

# Seconds by which the server's timeout is longer than the caller's own, which ends a call first:
# it is for callers that were killed.
_SERVER_GRACE = 1
_MAX_SERVER_TIMEOUT = 31 * 24 * 3600

_REJECTIONS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class Rejected:
    """The jobs for which a submission was not accepted, by index, with their errors."""

    errors: dict[int, TraceError]


async def submit(
    connection: Connection,
    jobs: Sequence[Job],
    deadline: Deadline,
    priority: types_pb2.Priority.ValueType,
    key: str | None = None,
) -> Submission | Rejected:
    """Submit jobs; repeated under one idempotency key until there is an answer.

    If the caller leaves early, the submission is cancelled on the server, also if its answer was
    not seen. A `key` is given for jobs that may have been submitted before; default: a new one.

    Raises
    ------
    TraceError
        If the server can not be reached, or refuses for a reason that is no single job's.
    """
    _set_server_timeout(jobs, deadline)
    _set_trace_parent(jobs)
    request = trace_pb2.SubmitJobsRequest(
        idempotency_key=key or str(uuid.uuid4()),
        jobs=[job.spec for job in jobs],
        priority=priority,
    )
    submission = connection.pending.add(request)

    def send(server: Server) -> Method[trace_pb2.SubmitJobsRequest, trace_pb2.SubmitJobsResponse]:
        submission.sent = True
        return server.traces.SubmitJobs

    def is_rejection(status: RpcStatus) -> bool:
        # Any other failure says that the server did not take the jobs.
        submission.sent = status.code in TRANSIENT
        return status.code in _REJECTIONS

    try:
        answer = await connection.try_call(send, request, deadline, is_rejection)
    except BaseException:
        await connection.pending.abandon(submission, unreachable=deadline.unreachable)
        raise
    if isinstance(answer, RpcStatus):
        connection.pending.finished(submission)
        return _rejected(answer, jobs, connection.address)
    connection.pending.accepted(submission, answer)
    if len(answer.job_ids) != len(jobs):
        await connection.pending.abandon(submission, unreachable=False)
        raise ProtocolError(f"{len(jobs)} jobs were accepted as {len(answer.job_ids)}")
    return submission


def _set_server_timeout(jobs: Sequence[Job], deadline: Deadline) -> None:
    remaining = deadline.remaining()
    if remaining is None:
        return
    seconds = math.ceil(min(remaining + _SERVER_GRACE, _MAX_SERVER_TIMEOUT))
    for job in jobs:
        job.spec.timeout.seconds = seconds


def _set_trace_parent(jobs: Sequence[Job]) -> None:
    """Make jobs part of the caller's OpenTelemetry span, if there is one."""
    if "opentelemetry" not in sys.modules:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    if parent := carrier.get("traceparent"):
        for job in jobs:
            job.spec.traceparent = parent


def _rejected(status: RpcStatus, jobs: Sequence[Job], address: str) -> Rejected:
    errors: dict[int, TraceError] = {}
    for index, violations in status.by_job().items():
        if index >= len(jobs):
            raise ProtocolError(f"job {index} of {len(jobs)} was rejected")
        errors[index] = from_rejection(status.code, violations, jobs[index].rename)
        if any(violation.field == "model" for violation in violations):
            # Every other job for this model has the same fault: no need to submit them once more.
            for other, job in enumerate(jobs):
                if job.spec.model == jobs[index].spec.model:
                    errors.setdefault(other, errors[index])
    if not errors:
        raise from_status(status, address)
    return Rejected(errors)
