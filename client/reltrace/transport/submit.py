"""Submits jobs, only once even if the call has to be repeated."""

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
from reltrace.transport.status import RpcStatus, from_status, job_error
from reltrace.types.errors import InvalidArgument, NotFound, ProtocolError, TraceError
from reltrace.types.request import Job

# Seconds by which the server's timeout is longer than the caller's, which ends a call first: the
# server's timeout is for callers that were killed.
_SERVER_GRACE = 1
_MAX_SERVER_TIMEOUT = 31 * 24 * 3600

_REJECTIONS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A submission that was not accepted: the errors of the jobs at fault, by index."""

    errors: dict[int, TraceError]


async def submit(
    connection: Connection,
    jobs: Sequence[Job],
    deadline: Deadline,
    priority: types_pb2.Priority.ValueType,
    key: str | None = None,
) -> Submission | Rejected:
    """Submit jobs, repeatedly under one idempotency key until there is an answer.

    If the call is cancelled or fails, the submission is cancelled on the server, even if its answer
    was not received. `key` is that of jobs that may have been submitted before; default: a new one.

    Raises
    ------
    TraceError
        If the server can not be reached, or refuses for a reason other than single jobs.
    """
    submission = Submission(_request(jobs, deadline, priority, key or new_key()))
    return await _send(connection, submission, jobs, deadline) or submission


async def resubmit(
    connection: Connection,
    submission: Submission,
    jobs: Sequence[Job],
    deadline: Deadline,
    key: str,
) -> Rejected | None:
    """Submit jobs of a submission again, which the server has lost; it then consists of them.

    Otherwise like `submit`.
    """
    connection.pending.finished(submission)
    submission.request = _request(jobs, deadline, submission.request.priority, key)
    submission.id, submission.job_ids, submission.sent = "", (), False
    return await _send(connection, submission, jobs, deadline)


def new_key() -> str:
    return str(uuid.uuid4())


def is_key_taken(error: TraceError) -> bool:
    """Return whether a submission was refused because its key belongs to other jobs."""
    return any(violation.field == "idempotency_key" for violation in error.violations)


def _request(
    jobs: Sequence[Job], deadline: Deadline, priority: types_pb2.Priority.ValueType, key: str
) -> trace_pb2.SubmitJobsRequest:
    _set_server_timeout(jobs, deadline)
    _set_trace_parent(jobs)
    return trace_pb2.SubmitJobsRequest(
        idempotency_key=key, jobs=[job.spec for job in jobs], priority=priority
    )


async def _send(
    connection: Connection, submission: Submission, jobs: Sequence[Job], deadline: Deadline
) -> Rejected | None:
    connection.pending.add(submission)

    def send(server: Server) -> Method[trace_pb2.SubmitJobsRequest, trace_pb2.SubmitJobsResponse]:
        submission.sent = True
        return server.traces.SubmitJobs

    def is_rejection(status: RpcStatus) -> bool:
        # Any other failure says that the server did not take the jobs.
        submission.sent = status.code in TRANSIENT
        return status.code in _REJECTIONS

    try:
        answer = await connection.try_call(send, submission.request, deadline, is_rejection)
    except BaseException:
        await connection.pending.abandon(submission, unreachable=deadline.unreachable)
        raise
    if isinstance(answer, RpcStatus):
        connection.pending.finished(submission)
        return _rejected(answer, jobs, connection.address)
    connection.pending.accepted(submission, answer)
    connection.note_unserved(answer.unserved)
    if len(answer.job_ids) != len(jobs):
        await connection.pending.abandon(submission, unreachable=False)
        raise ProtocolError(f"{len(jobs)} jobs were accepted as {len(answer.job_ids)}")
    return None


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
    kind = NotFound if status.code is grpc.StatusCode.NOT_FOUND else InvalidArgument
    errors: dict[int, TraceError] = {}
    for index, violations in status.by_job().items():
        if index >= len(jobs):
            raise ProtocolError(f"job {index} of {len(jobs)} was rejected")
        errors[index] = job_error(kind, violations, jobs[index].rename)
        if any(violation.field == "model" for violation in violations):
            # Every other job for this model has the same fault and need not be submitted again.
            for other, job in enumerate(jobs):
                if job.spec.model == jobs[index].spec.model:
                    errors.setdefault(other, errors[index])
    if not errors:
        raise from_status(status, address)
    return Rejected(errors)
