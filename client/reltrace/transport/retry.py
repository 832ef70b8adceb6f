"""Deadlines, and when and how long a failed call is repeated."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from random import SystemRandom

import grpc

from reltrace.transport.settings import ADDRESS_VARIABLE
from reltrace.transport.status import RpcStatus, from_status
from reltrace.types.errors import DeadlineExceeded, TraceError, Unavailable, invalid

log = logging.getLogger("reltrace")
# Not the module's generator, which the caller may have seeded.
_random = SystemRandom()

_MAX_RETRY_DELAY = 60.0
# Seconds without an answer, or of waiting, before it is logged.
_LOG_AFTER = 3.0
# Many calls may wait, in turn, for hours.
_LOG_WAITING_EVERY = 600.0

# How a call ends if its server stops. The server may have done what it was asked for.
TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


# What gRPC itself answers, without a delay, where a server has as many calls as it takes.
_TOO_MANY_CALLS = "Concurrent RPC limit exceeded"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Deadline:
    """The end of a call, `timeout` seconds from now; None: no end.

    Attributes
    ----------
    cause : TraceError or None
        Why no server answers, or accepts the call, at present; for the message of the error.
    """

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not (is_number(timeout) and timeout > 0):
            raise invalid("timeout", f"must be a number of seconds above 0, not {timeout!r}")
        self.timeout = timeout
        self.cause: TraceError | None = None
        # For gRPC an infinite timeout is over at once.
        endless = timeout is None or timeout == math.inf
        self._end = None if endless else time.monotonic() + (timeout or 0)

    @property
    def unreachable(self) -> bool:
        """Whether no server answers at present."""
        return isinstance(self.cause, Unavailable)

    def remaining(self) -> float | None:
        """Return the seconds left, at least 0; None: no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def error(self) -> DeadlineExceeded:
        cause = "" if self.cause is None else f": {self.cause}"
        return DeadlineExceeded(f"not finished within the timeout of {self.timeout:g} s{cause}")

    def check(self) -> None:
        if self.remaining() == 0.0:
            raise self.error()


class OutageLog:
    """Logs once, for all calls, that no server answers, and once that one answers again.

    Also why calls wait for a server that answers, but can not take them.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._logged = False
        self._waiting_logged_at = -math.inf

    def failing(self, cause: TraceError, left: float) -> None:
        if not self._logged:
            self._logged = True
            log.warning("%s; trying again for %.0f s", cause, left)

    def waiting(self, cause: TraceError) -> None:
        now = time.monotonic()
        if now - self._waiting_logged_at > _LOG_WAITING_EVERY:
            self._waiting_logged_at = now
            log.warning("%s; waiting until it can", cause)

    def answered(self) -> None:
        if self._logged:
            self._logged = False
            log.warning("the reltrace server at %s answers again", self._address)


class Retries:
    """Decides after each failed call whether to repeat it, and waits before that.

    Calls that end as `TRANSIENT` are repeated with rising, jittered delays for `patience` seconds
    since the last success, calls that end as RESOURCE_EXHAUSTED after the delay that the server
    asks for.
    """

    def __init__(
        self, patience: float, address: str, deadline: Deadline, outage: OutageLog
    ) -> None:
        self._patience = patience
        self._address = address
        self._deadline = deadline
        self._outage = outage
        self._failing_since: float | None = None
        self._waiting_since: float | None = None
        self._failures = 0

    def succeeded(self) -> None:
        self._failing_since = self._waiting_since = None
        self._outage.answered()
        self._failures = 0
        self._deadline.cause = None

    async def after(self, status: RpcStatus) -> None:
        """Wait before the next call.

        Raises
        ------
        TraceError
            The error of `status`, if the call is not repeated, or not any longer.
        """
        self._deadline.check()
        if status.code is grpc.StatusCode.RESOURCE_EXHAUSTED and status.retry_after is not None:
            delay = min(max(status.retry_after, 0.01), _MAX_RETRY_DELAY)
            self._note_waiting(status)
        elif status.code in TRANSIENT or _TOO_MANY_CALLS in status.message:
            delay = self._next_delay(status)
        else:
            raise from_status(status, self._address)
        remaining = self._deadline.remaining()
        await asyncio.sleep(delay if remaining is None else min(delay, remaining))
        self._deadline.check()

    def _note_waiting(self, status: RpcStatus) -> None:
        now = time.monotonic()
        since = self._waiting_since or now
        self.succeeded()
        self._waiting_since = since
        cause = self._deadline.cause = from_status(status, self._address)
        if now - since >= _LOG_AFTER:
            self._outage.waiting(cause)

    def _next_delay(self, status: RpcStatus) -> float:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        unavailable = RpcStatus(grpc.StatusCode.UNAVAILABLE, status.message)
        cause = self._deadline.cause = from_status(unavailable, self._address)
        left = self._failing_since + self._patience - now
        if left <= 0:
            # A server with TLS closes a plaintext connection without saying why.
            tls = " Does it ask for TLS?" if "Socket closed" in status.message else ""
            raise type(cause)(
                f"{cause} (tried for {self._patience:g} s; is it running?{tls} `reltrace up` "
                f"starts one, and {ADDRESS_VARIABLE} names another)"
            )
        if now - self._failing_since >= _LOG_AFTER:
            self._outage.failing(cause, left)
        ceiling = min(2.0, 0.05 * 2 ** min(self._failures, 10))
        self._failures += 1
        return min(_random.uniform(ceiling / 2, ceiling), left)
