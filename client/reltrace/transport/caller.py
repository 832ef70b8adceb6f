"""Unary calls to one or several servers, repeated until one of them answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from reltrace_proto.net import Credentials, Metadata

from reltrace.transport.retry import TRANSIENT, Deadline, OutageLog, Retries, is_number
from reltrace.transport.servers import Server, Servers
from reltrace.transport.settings import as_invalid_argument, server_addresses
from reltrace.transport.status import RpcStatus
from reltrace.types.errors import TraceError, invalid

# Seconds after which a call that is neither answered nor refused is made again.
_CALL_TIMEOUT = 30.0
_DEFAULT_TIMEOUT = 60.0

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


class Method(Protocol[Request, Response]):
    """A unary call of a stub."""

    def __call__(
        self, request: Request, /, *, timeout: float, metadata: Metadata
    ) -> Awaitable[Response]: ...


class Caller:
    """Calls servers with retries. Channels are opened by the first call, on its event loop.

    Raises `InvalidArgument` if the address is malformed, or if the token would be sent to it in
    plaintext.
    """

    def __init__(self, address: str | None, retry_timeout: float, credentials: Credentials) -> None:
        self.address, addresses = server_addresses(address)
        with as_invalid_argument():
            credentials.check(*addresses)
        if not (is_number(retry_timeout) and retry_timeout >= 0):
            raise invalid("retry_timeout", f"must be 0 or more seconds, not {retry_timeout!r}")
        self.retry_timeout = retry_timeout
        self._random = random.Random()
        self._credentials = credentials
        self._servers = Servers(addresses, credentials, self._random)
        self._outage = OutageLog(self.address)
        self._closed = False
        self._background: set[asyncio.Task[None]] = set()

    def check_open(self) -> None:
        """Raise `TraceError` if the client has been closed.

        Closing a channel cancels its calls; to the tasks that wait for them this looks as if
        they had been cancelled themselves.
        """
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise TraceError("the client is closed")

    def choose_server(self) -> Server:
        self.check_open()
        return self._servers.choose()

    def failed(self, server: Server, status: RpcStatus) -> None:
        """Note how a call failed: if the server was unreachable, the next call avoids it."""
        if status.code in TRANSIENT:
            self._servers.failed(server)

    @property
    def metadata(self) -> Metadata:
        return self._credentials.metadata()

    def outdated(self, status: RpcStatus, metadata: Metadata) -> bool:
        """Tell whether a call was refused for a token that has been replaced since."""
        return status.code is grpc.StatusCode.UNAUTHENTICATED and metadata != self.metadata

    def retries(self, deadline: Deadline) -> Retries:
        return Retries(self.retry_timeout, self.address, deadline, self._random, self._outage)

    async def call(
        self,
        method: Callable[[Server], Method[Request, Response]],
        request: Request,
        deadline: Deadline | None = None,
    ) -> Response:
        """Call until there is an answer, by default for a minute. All unary calls may be repeated.

        Raises
        ------
        TraceError
            A subclass that tells why there is no answer.
        """
        answer = await self.try_call(
            method, request, deadline or Deadline(_DEFAULT_TIMEOUT), lambda status: False
        )
        assert not isinstance(answer, RpcStatus)
        return answer

    async def try_call(
        self,
        method: Callable[[Server], Method[Request, Response]],
        request: Request,
        deadline: Deadline,
        is_answer: Callable[[RpcStatus], bool],
        *,
        while_closing: bool = False,
    ) -> Response | RpcStatus:
        """Call as `call` does, but return the failures for which `is_answer` is true.

        With `while_closing`, call even while the client is being closed.
        """
        retries = self.retries(deadline)
        while True:
            deadline.check()
            remaining = deadline.remaining()
            timeout = _CALL_TIMEOUT if remaining is None else min(remaining, _CALL_TIMEOUT)
            server = self._servers.choose() if while_closing else self.choose_server()
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
            if is_answer(status):
                return status
            if not self.outdated(status, metadata):
                await retries.after(status)

    def keep(self, task: asyncio.Task[None]) -> None:
        """Let a task that nobody waits for go on until it is over or the client is closed."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)
