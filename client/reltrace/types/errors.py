"""All errors that callers get."""
# ruff: noqa: N818 - the names follow gRPC's status codes, which people search for

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape

from reltrace_proto.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a request.

    Attributes
    ----------
    field : str
        The argument at fault, as the caller wrote it: "prompt", "target[1].contrast".
    description : str
        What is wrong and what is allowed.
    """

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class TraceError(Exception):
    """Base of all errors of this package.

    Attributes
    ----------
    violations : tuple of Violation
        The faults of the request, if the error is about its fields.
    job_id : str or None
        Id of the job that ended with it, as in the server's logs; None if there was none.
    """

    def __init__(
        self, message: str, *, violations: Iterable[Violation] = (), job_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.violations = tuple(violations)
        self.job_id = job_id


class InvalidArgument(TraceError, ValueError):
    """An argument has a value that is not allowed; the message names it."""


class ModelNotFound(TraceError):
    """No worker serves the model that was asked for; the message lists the served ones."""


class NotFound(TraceError):
    """The server does not have what was asked for, such as results that have expired."""


class Unavailable(TraceError):
    """No server could be reached, or was ready, for the client's `retry_timeout`."""


class DeadlineExceeded(TraceError, TimeoutError):
    """The call did not finish within its `timeout`."""


class ResourceExhausted(TraceError):
    """There is no room for the request, or for a result of its size; waiting does not help."""


class PermissionDenied(TraceError):
    """The server does not accept the caller's token, or does not allow it this call."""


class Cancelled(TraceError):
    """The job was cancelled on the server."""


class JobFailed(TraceError):
    """The worker could not finish the job, for a reason other than its arguments."""


@dataclass(frozen=True, slots=True)
class LostLease:
    """A worker that died, or stopped sending heartbeats, while it held the lease of a job.

    Attributes
    ----------
    attempt : int
        Number of the attempt, counted from 1.
    worker : str
        The worker's id.
    lost_at : datetime.datetime or None
        When its lease expired, in UTC.
    """

    attempt: int
    worker: str
    lost_at: datetime | None


class Quarantined(JobFailed):
    """The job was quarantined because too many workers lost it.

    Attributes
    ----------
    lost_leases : tuple of LostLease
        The workers that lost it.
    """

    lost_leases: tuple[LostLease, ...] = ()


class StoreUnreadable(TraceError):
    """The store of the tensors can not be read from here, or no longer has them."""


class ProtocolError(TraceError):
    """The server's answer violates the protocol, by a bug or because versions are incompatible."""


class MissingDependency(TraceError, ImportError):
    """An optional library is not installed; the message says how to install it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An item of `trace_many` that failed.

    Attributes
    ----------
    id : str or int
        The item's id: the given one, else its index.
    reason : TraceError
        Why it failed.
    error : TraceError
        `reason` with the item's id in front of its message, to be raised.
    """

    id: str | int
    reason: TraceError
    error: TraceError = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", with_item(self.reason, self.id))

    @property
    def job_id(self) -> str | None:
        """Id of the job that failed, as in the server's logs; None if there was none."""
        return self.error.job_id

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the kind of error and its message, which names the item."""
        kind, message = type(self.error).__name__, escape(str(self.error))
        return f"<div><strong>{kind}</strong>: <code>{message}</code></div>"


def invalid(field: str, description: str) -> InvalidArgument:
    """Return the error for one argument."""
    violation = Violation(field, description)
    return InvalidArgument(str(violation), violations=(violation,))


def with_item(error: TraceError, item: str | int) -> TraceError:
    """Return `error` with the id of the `trace_many` item in front of its message."""
    other = copy(error)
    other.args = (f"item {item!r}: {error}",)
    other.__cause__ = error.__cause__
    return other


def lost_leases(wire: Iterable[types_pb2.LostLease]) -> tuple[LostLease, ...]:
    """Translate the history of a job that lost its workers."""
    return tuple(
        LostLease(
            lost.attempt,
            lost.worker_id,
            lost.lost_at.ToDatetime(UTC) if lost.HasField("lost_at") else None,
        )
        for lost in wire
    )
