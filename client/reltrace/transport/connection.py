"""Calls to one or several servers, repeated until one of them answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import grpc
import grpc.aio
from reltrace_proto.net import Credentials, Metadata

from reltrace.transport.pending import PendingSubmissions
from reltrace.transport.retry import TRANSIENT, Deadline, OutageLog, Retries, is_number
from reltrace.transport.servers import Method, Request, Response, Server, Servers
from reltrace.transport.settings import as_invalid_argument, server_addresses
from reltrace.transport.status import RpcStatus
from reltrace.types.errors import TraceError, invalid

log = logging.getLogger("reltrace")

# Seconds after which a call that is neither answered nor refused is made again, and bytes per
# second at which the slowest of lines would send its message meanwhile.
_CALL_TIMEOUT = 30.0
_SLOWEST_LINE = 64 * 1024
_DEFAULT_TIMEOUT = 60.0
# Seconds that closing waits for what finishes in the background.
_CLOSE_TIMEOUT = 5.0


class Connection:
    """What a client has of its servers: calls to them, and the submissions that it waits for.

    Channels are opened by the first call, on its event loop. Raises `InvalidArgument` if the
    address is malformed, or if the token would be sent to it in plaintext.
    """

    def __init__(self, address: str | None, retry_timeout: float, credentials: Credentials) -> None:
        self.address, addresses = server_addresses(address)
        with as_invalid_argument():
            credentials.check(*addresses)
        if not (is_number(retry_timeout) and retry_timeout >= 0):
            raise invalid("retry_timeout", f"must be 0 or more seconds, not {retry_timeout!r}")
        self.retry_timeout = retry_timeout
        self.pending = PendingSubmissions(self)
        self._credentials = credentials
        self._servers = Servers(addresses, credentials)
        self._outage = OutageLog(self.address)
        self._closed = False
        self._unserved: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()

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

    @property
    def metadata(self) -> Metadata:
        return self._credentials.metadata()

    def retries(self, deadline: Deadline) -> Retries:
        return Retries(self.retry_timeout, self.address, deadline, self._outage)

    async def wait_to_retry(
        self, retries: Retries, status: RpcStatus, server: Server, metadata: Metadata
    ) -> None:
        """Wait before a failed call is repeated; raise its error if it is not to be repeated."""
        if status.code in TRANSIENT:
            server.failed()
        replaced = status.code is grpc.StatusCode.UNAUTHENTICATED and metadata != self.metadata
        # Refused for a token that has been replaced since: the new one is tried at once.
        if not replaced:
            await retries.after(status)

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
            timeout = _CALL_TIMEOUT + request.ByteSize() / _SLOWEST_LINE
            if remaining is not None:
                timeout = min(remaining, timeout)
            server = self._servers.choose() if while_closing else self.choose_server()
            metadata = self.metadata
            try:
                answer = await method(server)(request, timeout=timeout, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                status = RpcStatus.of(error)
            except asyncio.CancelledError:
                self.check_open()
                raise
            else:
                server.succeeded()
                retries.succeeded()
                return answer
            if is_answer(status):
                return status
            await self.wait_to_retry(retries, status, server, metadata)

    def note_unserved(self, models: Iterable[str]) -> None:
        """Say once of each model that its jobs wait for a worker."""
        for model in models:
            if model not in self._unserved:
                self._unserved.add(model)
                log.warning("no worker serves %s at present; its jobs wait for one", model)

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that nobody waits for, until it is over or the client is closed."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def finish_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that only `close` waits for, such as an acknowledgement."""
        task = self.run_in_background(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def close(self) -> None:
        """Close the channels; calls that are open end with an error, their jobs are cancelled."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                while self._finishing:
                    await asyncio.wait(self._finishing)
        except TimeoutError:
            pass
        self._closed = True
        await self.pending.close()
        for task in self._background:
            task.cancel()
        await self._servers.close()
