"""What an error of Redis says about the state of Redis: full, not to be written to, or away."""

import re
import time

import structlog
from redis import exceptions as redis_errors

from reltrace_scheduler.errors import SchedulerError, StoreFullError, UnavailableError

log = structlog.get_logger()

REDIS_ERRORS = (redis_errors.RedisError, redis_errors.RedisClusterException, OSError)
"""Everything that a call of redis-py raises: the client of a cluster has errors of its own."""

FULL = "OOM"
AWAY = "AWAY"
"""No connection, or no answer in time."""
READ_ONLY = ("READONLY", "MASTERDOWN")
"""Codes of a replica, such as a primary that was demoted."""

_CODES = (
    FULL, *READ_ONLY, "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "LOADING", "BUSY", "TRYAGAIN",
)  # fmt: skip
# redis-py takes some codes off the text and has classes for them. The error of a script begins with
# the code from Redis 7.0 on; before, the code comes after a dash.
_CODE = re.compile(rf"(?:^\W*|: -)({'|'.join(_CODES)})\b")
_CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (redis_errors.OutOfMemoryError, FULL),
    (redis_errors.ReadOnlyError, "READONLY"),
    (redis_errors.MasterDownError, "MASTERDOWN"),
    (redis_errors.BusyLoadingError, "LOADING"),
    (redis_errors.TryAgainError, "TRYAGAIN"),
    (redis_errors.ClusterError, "CLUSTERDOWN"),
    (redis_errors.RedisClusterException, "CLUSTERDOWN"),
    (redis_errors.ConnectionError, AWAY),
    (redis_errors.TimeoutError, AWAY),
    # A deadline around calls of Redis.
    (TimeoutError, AWAY),
)

_QUIET = 10.0
"""Seconds between lines of one kind in the log: every call may fail while Redis is away."""
_said: dict[tuple[str, str], float] = {}


def reason_of(error: BaseException) -> str:
    """Return what Redis said, without the command, which redis-py quotes and which may hold texts
    of jobs.
    """
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    return text.rpartition(" of pipeline caused error: ")[2]


def trouble_of(error: BaseException) -> str | None:
    """Return the code of a state of Redis that passes, `AWAY` among them; None: it is no such."""
    for kind, code in _CLASSES:
        if isinstance(error, kind):
            return code
    if not isinstance(error, redis_errors.ResponseError):
        return None
    found = _CODE.search(reason_of(error))
    return found[1] if found else None


def answer_to(error: BaseException) -> SchedulerError | None:
    """Return what callers are told of such an error; None: it is another."""
    code = trouble_of(error)
    if code is None:
        return None
    if code == FULL:
        return StoreFullError()
    return UnavailableError(
        "the job store can not be reached at present; try again"
        if code == AWAY
        else f"the job store is not ready at present ({code}); try again"
    )


def log_trouble(event: str, error: BaseException, **where: str) -> None:
    """Log a failure: of each event and kind one line in some seconds, with no traceback of such."""
    code = trouble_of(error) or (AWAY if isinstance(error, OSError) else None)
    kind = (event, code or type(error).__name__)
    now = time.monotonic()
    if now - _said.get(kind, float("-inf")) < _QUIET:
        return
    _said[kind] = now
    if code is None:
        log.error(event, exc_info=error, **where)
    else:
        log.warning(event, error=reason_of(error) or "no answer in time", **where)
