"""Every error the scheduler answers with, as one flat module.

Handlers raise these; `interceptor.ErrorInterceptor` is the one place that turns them
into gRPC statuses with ``google.rpc`` details.
"""

from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a request: where it is and what is allowed there."""

    field: str
    description: str


class SchedulerError(Exception):
    """Base of all errors that have a gRPC status.

    Parameters
    ----------
    message : str
        What is wrong and what to do about it, for a person.
    violations : tuple of Violation
        Sent as ``google.rpc.BadRequest``.
    retry_after : float or None
        Seconds, sent as ``google.rpc.RetryInfo``.
    """

    code = grpc.StatusCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = violations
        self.retry_after = retry_after


class FaultyRequestError(SchedulerError):
    """Base of errors that faults of the request say all about."""

    def __init__(self, *violations: Violation) -> None:
        message = "; ".join(f"{v.field}: {v.description}" for v in violations)
        super().__init__(message, violations=violations)


class InvalidRequestError(FaultyRequestError):
    """The request is malformed; `violations` names every fault."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnknownModelError(FaultyRequestError):
    """No worker has ever served a model of that name."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownSubmissionError(FaultyRequestError):
    """The submission never was, has expired, or was acknowledged whole."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, submission_id: str) -> None:
        super().__init__(
            Violation(
                "submission_id",
                f"no submission {submission_id!r}: unknown, expired or acknowledged",
            )
        )


class UnknownJobError(FaultyRequestError):
    """A job that is named is not there."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownWorkerError(FaultyRequestError):
    """A worker that is named is not connected."""

    code = grpc.StatusCode.NOT_FOUND


class QueueFullError(SchedulerError):
    """The bound on jobs or bytes is reached; nothing was accepted."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after=1.0)


class IdempotencyError(FaultyRequestError):
    """The idempotency key was used for other jobs."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, key: str) -> None:
        super().__init__(
            Violation(
                "idempotency_key",
                f"{key!r} was used for other jobs; choose a new one per submission",
            )
        )


class SupersededError(SchedulerError):
    """A worker has connected anew; what its former session asks for is void."""

    code = grpc.StatusCode.ABORTED

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"worker {worker_id!r} has connected anew; this session is over")


class UnauthenticatedError(SchedulerError):
    """The caller presents no token, or none that holds."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ForbiddenError(SchedulerError):
    """The caller's role does not allow the call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class TooFastError(SchedulerError):
    """The caller is over its rate."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)


class UnavailableError(SchedulerError):
    """Redis is away, or no worker has connected yet: the same call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after=0.5)


class StartError(Exception):
    """The scheduler can not start; the message says what to change."""
