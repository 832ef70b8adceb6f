"""Errors as `google.rpc.Status`, shortened to a size that gRPC delivers."""

from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from reltrace_scheduler.errors import SchedulerError

# gRPC drops a status of more than 16 KiB, and by chance one of more than 8 KiB, and says that the
# server had no room. The message is in it twice, once with three bytes for each that is not ASCII.
_MAX_MESSAGE, _MAX_DESCRIPTION, _MAX_DETAILS = 640, 1024, 4096


def status_of(error: SchedulerError) -> Status:
    """Return an error as a status, with its first violations and the number of the others."""
    status = Status(code=error.code.value[0], message=_cut(error.message, _MAX_MESSAGE))
    if error.violations:
        bad, left = BadRequest(), _MAX_DETAILS
        for violation in error.violations:
            description = _cut(violation.description, _MAX_DESCRIPTION)
            left -= len(violation.field.encode()) + len(description.encode()) + 8
            if left < 0 and bad.field_violations:
                break
            field = _cut(violation.field, _MAX_MESSAGE)
            bad.field_violations.add(field=field, description=description)
        if omitted := len(error.violations) - len(bad.field_violations):
            more = f"; and {omitted} faults more"
            status.message = _cut(error.message, _MAX_MESSAGE - len(more)) + more
        status.details.add().Pack(bad)
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def _cut(text: str, most: int) -> str:
    """Return the beginning of a text, at most so many bytes."""
    data = text.encode()
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"
