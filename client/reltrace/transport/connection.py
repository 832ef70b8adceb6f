"""The way to the servers: calls that are repeated until one of them answers."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from reltrace_proto.net import Credentials, Metadata

from reltrace.transport.pending import Leftovers
from reltrace.transport.servers import Server, Servers
from reltrace.transport.settings import ADDRESS_VARIABLE, as_invalid_argument, server_addresses
from reltrace.types.errors import DeadlineExceeded, RpcStatus, TraceError, from_status, invalid

log = logging.getLogger("reltrace")
# Silence of this length is worth a word to those who listen to the log.
_WORTH_A_WORD = 3.0

# A server that neither answers nor refuses within this time is called again.
_CALL_TIMEOUT = 30.0
_LONGEST_RETRY_DELAY = 60.0

# A server that goes away answers with one of these or not at all. It may have done what it was
# asked.
PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class Method(Protocol[Request, Response]):
    """A unary call of a stub."""

    def __call__(
        self, request: Request, /, *, timeout: float, metadata: Metadata
    ) -> Awaitable[Response]: ...


class Deadline:
    """The end of a caller's patience.

    Parameters
    ----------
    timeout : float or None
        Seconds from now; None: no end.

    Attributes
    ----------
    cause : TraceError or None
        Why the server does not answer at present, to be told when the time is over.
    """

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not (_is_number(timeout) and timeout > 0):
            raise invalid("timeout", f"must be a number of seconds above 0, not {timeout!r}")
        self.timeout = timeout
        self.cause: TraceError | None = None
        # gRPC takes an infinite timeout for one that is over.
        if timeout is None or timeout == math.inf:
            self._end: float | None = None
        else:
            self._end = time.monotonic() + timeout

    @property
    def away(self) -> bool:
        """Whether the server does not answer at present."""
        return self.cause is not None

    def remaining(self) -> float | None:
        """Return the seconds left, at least 0; None: no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def error(self) -> DeadlineExceeded:
        """Return the error to raise when the time is over."""
        why = "" if self.cause is None else f": {self.cause}"
        return DeadlineExceeded(f"not finished within the timeout of {self.timeout:g} s{why}")

    def check(self) -> None:
        """Raise `DeadlineExceeded` if the time is over."""
        if self.remaining() == 0.0:
            raise self.error()


class Outage:
    """Tells the log once that no server answers, however many calls wait, and once that it is over.

    Parameters
    ----------
    address : str
        Of the servers.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._said = False

    def goes_on(self, cause: TraceError, left: float) -> None:
        """Note that a call has waited for a while, and how long it will go on."""
        if not self._said:
            self._said = True
            log.warning("%s; trying again for %.0f s", cause, left)

    def over(self) -> None:
        """Note an answer."""
        if self._said:
            self._said = False
            log.warning("the reltrace server at %s answers again", self._address)


class Retries:
    """Decides after each failed call whether to call again, and waits until then.

    UNAVAILABLE, a call that the server drops, and one without an answer are repeated, with rising
    and jittered delays, for `patience` seconds since the last success; RESOURCE_EXHAUSTED when
    the server says when.
    """

    def __init__(
        self,
        patience: float,
        address: str,
        deadline: Deadline,
        random_source: random.Random,
        outage: Outage,
    ) -> None:
        self._patience = patience
        self._address = address
        self._deadline = deadline
        self._random = random_source
        self._outage = outage
        self._failing_since: float | None = None
        self._failures = 0

    def succeeded(self) -> None:
        """Note progress: patience starts anew."""
        self._failing_since = None
        self._outage.over()
        self._failures = 0
        self._deadline.cause = None

    async def after(self, status: RpcStatus) -> None:
        """Wait before the next call, or raise why there is none.

        Raises
        ------
        TraceError
            The error of `status`, if repeating the call is of no use any more.
        """
        self._deadline.check()
        now = time.monotonic()
        if status.code is grpc.StatusCode.RESOURCE_EXHAUSTED and status.retry_after is not None:
            self.succeeded()
            delay = min(max(status.retry_after, 0.01), _LONGEST_RETRY_DELAY)
        elif status.code in PASSING:
            if self._failing_since is None:
                self._failing_since = now
            self._deadline.cause = self._unavailable(status)
            left = self._failing_since + self._patience - now
            if left <= 0:
                raise self._gave_up(status)
            if now - self._failing_since >= _WORTH_A_WORD:
                self._outage.goes_on(self._deadline.cause, left)
            ceiling = min(2.0, 0.05 * 2 ** min(self._failures, 10))
            delay = min(self._random.uniform(ceiling / 2, ceiling), left)
            self._failures += 1
        else:
            raise from_status(status, self._address)
        remaining = self._deadline.remaining()
        await asyncio.sleep(delay if remaining is None else min(delay, remaining))
        self._deadline.check()

    def _unavailable(self, status: RpcStatus) -> TraceError:
        return from_status(RpcStatus(grpc.StatusCode.UNAVAILABLE, status.message), self._address)

    def _gave_up(self, status: RpcStatus) -> TraceError:
        error = self._unavailable(status)
        # What a server that speaks TLS does to a connection that does not, and says nothing.
        tls = " Does it ask for TLS?" if "Socket closed" in status.message else ""
        return type(error)(
            f"{error} (tried for {self._patience:g} s; is it running?{tls} `reltrace up` starts "
            f"one, and {ADDRESS_VARIABLE} names another)"
        )


class Connection:
    """Channels to one or several servers, made at the first call, on the event loop of that call.

    Parameters
    ----------
    address : str or None
        See `server_addresses`.
    retry_timeout : float
        Seconds to keep calling when no server can be reached.
    credentials : Credentials
        Token and TLS.

    Attributes
    ----------
    address : str
        Of the servers.
    retry_timeout : float
        As given.
    leftovers : Leftovers
        What is to be cancelled on them.

    Raises
    ------
    InvalidArgument
        If the address is malformed, or the token would be sent to it in plaintext.
    """

    def __init__(self, address: str | None, retry_timeout: float, credentials: Credentials) -> None:
        self.address, addresses = server_addresses(address)
        with as_invalid_argument():
            credentials.check(*addresses)
        if not (_is_number(retry_timeout) and retry_timeout >= 0):
            raise invalid("retry_timeout", f"must be 0 or more seconds, not {retry_timeout!r}")
        self.retry_timeout = retry_timeout
        self._random = random.Random()
        self._credentials = credentials
        self._servers = Servers(addresses, credentials, self._random)
        self._outage = Outage(self.address)
        self._closed = False
        self._kept: set[asyncio.Task[None]] = set()
        self.leftovers = Leftovers(self)

    def check_open(self) -> None:
        """Raise `TraceError` if this side has closed the connection.

        Closing a channel cancels its calls; to the tasks that wait for them this looks as if
        they had been cancelled themselves.
        """
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise TraceError("the client is closed")

    def server(self) -> Server:
        """Return the server for the next call.

        Raises
        ------
        TraceError
            If this side has closed the connection.
        """
        self.check_open()
        return self._servers.choose()

    def failed(self, server: Server, status: RpcStatus) -> None:
        """Note how a call to a server failed: the next one goes to another if it was away."""
        if status.code in PASSING:
            self._servers.failed(server)

    @property
    def metadata(self) -> Metadata:
        """What goes with each call."""
        return self._credentials.metadata()

    def outdated(self, status: RpcStatus, metadata: Metadata) -> bool:
        """Return whether a call failed for a token that has been replaced since."""
        return status.code is grpc.StatusCode.UNAUTHENTICATED and metadata != self.metadata

    def retries(self, deadline: Deadline) -> Retries:
        """Return the retry policy for one piece of work."""
        return Retries(self.retry_timeout, self.address, deadline, self._random, self._outage)

    async def call(
        self,
        method: Callable[[Server], Method[Request, Response]],
        request: Request,
        deadline: Deadline,
        *,
        keep: Callable[[RpcStatus], bool] = lambda status: False,
        closing: bool = False,
    ) -> Response | RpcStatus:
        """Call until there is an answer. All unary calls of the service may be repeated.

        Parameters
        ----------
        method : callable
            From a server to the call of one of its stubs.
        request : Message
            Its request.
        deadline : Deadline
            When to give up.
        keep : callable
            Says which failures the caller handles: these are returned instead of raised.
        closing : bool
            Call even while the connection is being closed.

        Raises
        ------
        TraceError
            A subclass that tells why there is no answer.
        """
        retries = self.retries(deadline)
        while True:
            deadline.check()
            remaining = deadline.remaining()
            timeout = _CALL_TIMEOUT if remaining is None else min(remaining, _CALL_TIMEOUT)
            server = self._servers.choose() if closing else self.server()
            metadata = self.metadata
            try:
                answer = await method(server)(request, timeout=timeout, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                status = RpcStatus.of(error)
                self.failed(server, status)
            except asyncio.CancelledError:
                self.check_open()
                raise
            else:
                server.succeeded()
                return answer
            if keep(status):
                return status
            if self.outdated(status, metadata):
                continue
            await retries.after(status)

    async def call_last(
        self, method: Callable[[Server], Method[Request, Response]], request: Request
    ) -> Response | RpcStatus:
        """Call for a caller who has left: also while closing, and any refusal is an answer."""
        return await self.call(
            method,
            request,
            Deadline(None),
            keep=lambda status: status.code not in PASSING,
            closing=True,
        )

    def keep(self, task: asyncio.Task[None]) -> None:
        """Let a task go on that nobody waits for, until it is over or the connection is closed."""
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    async def close(self) -> None:
        """Close the channels; calls that are open end with an error, their jobs are cancelled."""
        self._closed = True
        await self.leftovers.close()
        for task in self._kept:
            task.cancel()
        await self._servers.close()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
