"""Translates statuses of gRPC and of jobs to errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from reltrace_proto.v1 import types_pb2

from reltrace.types.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    JobFailed,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    ProtocolError,
    Quarantined,
    ResourceExhausted,
    TraceError,
    Unavailable,
    Violation,
    lost_leases,
)

_DETAILS_KEY = "grpc-status-details-bin"
_JOB_FIELD = re.compile(r"^jobs\[(\d+)\](?:\.(.*))?$")


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """A gRPC error, decoded.

    Attributes
    ----------
    violations : tuple of Violation
        With the field paths of the wire: "jobs[3].prompt".
    retry_after : float or None
        Seconds after which the server asks to be called again.
    """

    code: grpc.StatusCode
    message: str
    violations: tuple[Violation, ...] = ()
    retry_after: float | None = None

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> RpcStatus:
        """Decode an error of grpc.aio with its `google.rpc.Status` details."""
        violations: list[Violation] = []
        retry_after: float | None = None
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        for detail in _details(error):
            if detail.Unpack(bad):
                violations += (Violation(v.field, v.description) for v in bad.field_violations)
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        message = error.details() or error.code().name
        return cls(error.code(), message, tuple(violations), retry_after)

    def by_job(self) -> dict[int, tuple[Violation, ...]]:
        """Return the violations by index of the job in the request, fields inside the job."""
        found: dict[int, list[Violation]] = {}
        for violation in self.violations:
            if match := _JOB_FIELD.match(violation.field):
                inside = Violation(match.group(2) or "", violation.description)
                found.setdefault(int(match.group(1)), []).append(inside)
        return {index: tuple(faults) for index, faults in found.items()}


def _details(error: grpc.aio.AioRpcError) -> Sequence[status_pb2.Status]:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return tuple(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return ()
    return ()


def from_status(status: RpcStatus, address: str) -> TraceError:
    """Return the error for a failed call to the server at `address`."""
    message = "; ".join(map(str, status.violations)) or status.message
    match status.code:
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"no answer from the reltrace server at {address}: {message}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"no answer from the server at {address} in time")
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return InvalidArgument(message, violations=status.violations)
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(message, violations=status.violations)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(
                f"the server at {address} can not accept the request: {message}"
            )
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(f"the server at {address} refuses: {message}")
        case grpc.StatusCode.CANCELLED:
            return Cancelled(f"the call to {address} was cancelled: {message}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(
                f"{address} does not serve this call ({message}); is it a reltrace server of "
                "this version?"
            )
        case code:
            return TraceError(f"the server at {address} failed ({code.name}): {message}")


def job_error(
    kind: type[TraceError],
    violations: Iterable[Violation | types_pb2.FieldViolation],
    rename: Callable[[str], str],
    message: str = "",
    job_id: str | None = None,
) -> TraceError:
    """Return the error for one job.

    `violations` name fields of the job as on the wire; `rename` returns the caller's names.
    """
    named = tuple(Violation(rename(v.field), v.description) for v in violations)
    if kind is NotFound and any(violation.field == "model" for violation in named):
        kind = ModelNotFound
    message = "; ".join(map(str, named)) or message or "the job failed without a reason"
    return kind(message, violations=named, job_id=job_id)


def from_job_end(end: types_pb2.JobEnd, rename: Callable[[str], str], job_id: str) -> TraceError:
    """Return the error for a job that ended without success."""
    kind = _BY_STATE.get(end.state) or _BY_CODE.get(end.error.code, JobFailed)
    error = job_error(kind, end.error.violations, rename, end.error.message, job_id)
    if isinstance(error, Quarantined):
        error.lost_leases = lost_leases(end.lost_leases)
    return error


_BY_STATE: dict[int, type[TraceError]] = {
    types_pb2.JOB_STATE_CANCELLED: Cancelled,
    types_pb2.JOB_STATE_QUARANTINED: Quarantined,
}
_BY_CODE: dict[int, type[TraceError]] = {
    code_pb2.INVALID_ARGUMENT: InvalidArgument,
    code_pb2.OUT_OF_RANGE: InvalidArgument,
    code_pb2.NOT_FOUND: NotFound,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceeded,
    code_pb2.RESOURCE_EXHAUSTED: ResourceExhausted,
}
