"""One server: its address, its channel, and calls that are repeated until they get through."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from reltrace_proto.v1 import admin_pb2_grpc, trace_pb2_grpc

from reltrace._errors import DeadlineExceeded, RpcStatus, TraceError, from_status, invalid

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "RELTRACE_SERVER"

# A server that neither answers nor refuses within this time is called again.
_CALL_TIMEOUT = 30.0
_LONGEST_RETRY_DELAY = 60.0

_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")

# A server that goes away answers with one of these or not at all.
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)

_OPTIONS = (
    # Chunks are about 1 MiB, and a message may hold many.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    # A stream may be silent for as long as a job takes: pings tell a slow server from a lost one.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # By default gRPC stops after two pings in a silence.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class Method(Protocol[Request, Response]):
    """A unary call of a stub."""

    def __call__(self, request: Request, /, *, timeout: float) -> Awaitable[Response]: ...


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
        self._end = None if timeout is None else time.monotonic() + timeout

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


class Retries:
    """Decides after each failed call whether to call again, and waits until then.

    UNAVAILABLE, a call that the server drops, and one without an answer are repeated, with rising
    and jittered delays, for `patience` seconds since the last success; RESOURCE_EXHAUSTED when
    the server says when.
    """

    def __init__(
        self, patience: float, address: str, deadline: Deadline, random_source: random.Random
    ) -> None:
        self._patience = patience
        self._address = address
        self._deadline = deadline
        self._random = random_source
        self._failing_since: float | None = None
        self._failures = 0

    def succeeded(self) -> None:
        """Note progress: patience starts anew."""
        self._failing_since = None
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
        elif status.code in _PASSING:
            if self._failing_since is None:
                self._failing_since = now
            self._deadline.cause = self._unavailable(status)
            left = self._failing_since + self._patience - now
            if left <= 0:
                raise self._gave_up(status)
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
        return type(error)(
            f"{error} (tried for {self._patience:g} s; is it running? `reltrace up` starts one, "
            f"and {ADDRESS_VARIABLE} names another)"
        )


class Connection:
    """A channel to one server, made at the first call, on the event loop of that call.

    Parameters
    ----------
    address : str or None
        "host:port"; None: environment variable RELTRACE_SERVER, else 127.0.0.1:50051.
    retry_timeout : float
        Seconds to keep calling a server that can not be reached.
    """

    def __init__(self, address: str | None, retry_timeout: float) -> None:
        self.address = resolve_address(address)
        if not (_is_number(retry_timeout) and retry_timeout >= 0):
            raise invalid("retry_timeout", f"must be 0 or more seconds, not {retry_timeout!r}")
        self._retry_timeout = retry_timeout
        self._random = random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    def check_open(self) -> None:
        """Raise `TraceError` if this side has closed the connection.

        Closing a channel cancels its calls; to the tasks that wait for them this looks as if
        they had been cancelled themselves.
        """
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise TraceError("the client is closed")

    def _open(self) -> grpc.aio.Channel:
        self.check_open()
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_options(self.address))
        return self._channel

    @property
    def traces(self) -> trace_pb2_grpc.TraceServiceAsyncStub:
        """The stub of TraceService."""
        return trace_pb2_grpc.TraceServiceStub(self._open())

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        """The stub of AdminService."""
        return admin_pb2_grpc.AdminServiceStub(self._open())

    def retries(self, deadline: Deadline) -> Retries:
        """Return the retry policy for one piece of work."""
        return Retries(self._retry_timeout, self.address, deadline, self._random)

    async def call(
        self,
        method: Method[Request, Response],
        request: Request,
        deadline: Deadline,
        *,
        keep: Callable[[RpcStatus], bool] = lambda status: False,
    ) -> Response | RpcStatus:
        """Call until there is an answer. All unary calls of the service may be repeated.

        Parameters
        ----------
        method : Method
            A call of a stub.
        request : Message
            Its request.
        deadline : Deadline
            When to give up.
        keep : callable
            Says which failures the caller handles: these are returned instead of raised.

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
            try:
                return await method(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                status = RpcStatus.of(error)
            except asyncio.CancelledError:
                self.check_open()
                raise
            if keep(status):
                return status
            await retries.after(status)

    async def close(self) -> None:
        """Close the channel; calls that are open end with an error."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _options(address: str) -> tuple[tuple[str, int], ...]:
    """Return the options of the channel to an address."""
    if address.startswith(_LOOPBACK):
        # gRPC would look for this machine through the proxy that the environment names.
        return (*_OPTIONS, ("grpc.enable_http_proxy", 0))
    return _OPTIONS


def resolve_address(address: str | None) -> str:
    """Return the address to use, checked.

    Raises
    ------
    InvalidArgument
        If it is not of the form host:port.
    """
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    if not isinstance(address, str):
        raise invalid("address", f"must be str, not {type(address).__name__}")
    if address.startswith("unix:"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise invalid(
            "address", f'must be "host:port", such as "{DEFAULT_ADDRESS}", not {address!r}'
        )
    return address
