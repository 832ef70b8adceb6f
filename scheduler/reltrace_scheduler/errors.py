"""Every error that the scheduler answers with, and its gRPC status.

Handlers raise these; `reltrace_scheduler.api.interceptor` is the one place that sends them.
"""

from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a request: where it is (empty: all of it) and what is allowed there."""

    field: str
    description: str

    def within(self, path: str) -> "Violation":
        """Return the same fault of a message that contains this one as its field `path`."""
        return Violation(f"{path}.{self.field}" if self.field else path, self.description)


class SchedulerError(Exception):
    """Base of all errors that have a gRPC status; the message says what to do about it."""

    code = grpc.StatusCode.INTERNAL
    retry_after: float | None = None
    """Seconds, sent as ``google.rpc.RetryInfo``."""
    violations: tuple[Violation, ...] = ()
    """Sent as ``google.rpc.BadRequest``."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(SchedulerError):
    """Base of errors that consist of faults of the request."""

    def __init__(self, *violations: Violation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class InvalidRequestError(RequestError):
    """The request is malformed; `violations` names every fault."""

    code = grpc.StatusCode.INVALID_ARGUMENT


def invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(Violation(field, description))


class IdempotencyError(InvalidRequestError):
    def __init__(self, key: str) -> None:
        fault = f"{key!r} was used for other jobs; choose a new one per submission"
        super().__init__(Violation("idempotency_key", fault))


class NotFoundError(RequestError):
    """A model, job or worker that is named is not there."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownSubmissionError(NotFoundError):
    """The submission never was, has expired, or was acknowledged whole."""

    def __init__(self, submission_id: str) -> None:
        fault = f"no submission {submission_id!r}: unknown, expired or acknowledged"
        super().__init__(Violation("submission_id", fault))


class QueueFullError(SchedulerError):
    """The bound on jobs or bytes is reached; nothing was accepted."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_after = 1.0


class StoreFullError(SchedulerError):
    """Redis is full: what needs more of its memory is refused, everything else goes on."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_after = 1.0

    def __init__(self) -> None:
        super().__init__(
            "the job store is full: nothing was stored; read results that wait, and try again"
        )


class TooLargeError(InvalidRequestError):
    """The jobs of one submission exceed the bound of the queue by themselves."""

    def __init__(self, fault: str) -> None:
        super().__init__(Violation("jobs", fault))


class TooFastError(SchedulerError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyStreamsError(SchedulerError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_after = 1.0

    def __init__(self, identity: str, most: int) -> None:
        super().__init__(
            f"{identity!r} has {most} streams open at this scheduler, and no more are allowed: "
            "try again when some have ended"
        )


class SupersededError(SchedulerError):
    code = grpc.StatusCode.ABORTED

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"worker {worker_id!r} has connected anew; this session is over")


class OutdatedError(SchedulerError):
    """The worker's protocol is older than what this scheduler serves."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnauthenticatedError(SchedulerError):
    """The caller presents no token, or none that is valid."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ForbiddenError(SchedulerError):
    """The caller's role does not allow the call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class UnavailableError(SchedulerError):
    """Redis is away or not ready, or no worker has connected yet; the call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE
    retry_after = 0.5


class NotReplicatedError(UnavailableError):
    """Too few replicas have what was written."""

    def __init__(self, confirmed: int, asked: int) -> None:
        super().__init__(
            f"stored, but only {confirmed} of {asked} replicas of the job store have confirmed it "
            "(--redis-replicas); try again: the same call stores nothing twice"
        )


class ResultLostError(UnavailableError):
    """Redis lost a result while it was read: a replica took over that had not received it."""

    def __init__(self, entry: int) -> None:
        super().__init__(f"the result in entry {entry} is not there any more; read it again")


class StartError(Exception):
    """The scheduler can not start; the message says what to change."""
