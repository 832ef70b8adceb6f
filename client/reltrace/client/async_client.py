"""The asyncio client: all of the client's logic; `Client` is a facade over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeAlias, overload

from reltrace.calls.pinning import Pins
from reltrace.calls.progress import Progress
from reltrace.calls.source import open_source
from reltrace.calls.trace_many import ManyRun, Result
from reltrace.client.generate import AsyncGenerate
from reltrace.client.queries import AsyncQueries
from reltrace.client.studies import AsyncStudies
from reltrace.client.tokenize import AsyncTokenize
from reltrace.transport.connection import Connection, Deadline
from reltrace.transport.pending import Leftovers
from reltrace.transport.settings import Tls, Token, credentials
from reltrace.transport.submission import Entry, Rejected, deliveries, submit
from reltrace.types.checks import whole_number
from reltrace.types.edit import EditLike
from reltrace.types.errors import TraceError
from reltrace.types.failure import Failure
from reltrace.types.prompt import Messages
from reltrace.types.request import Arguments, Dtype, Priority, wire_priority
from reltrace.types.target import Target, TargetLike
from reltrace.types.trace import Trace

Targets: TypeAlias = (
    list[TargetLike] | list[str] | list[int] | list[Target] | tuple[TargetLike, ...]
)
Item: TypeAlias = str | Mapping[str, Any]

_CLOSE_TIMEOUT = 5.0


class AsyncClient(AsyncQueries, AsyncGenerate, AsyncTokenize, AsyncStudies):
    """A client of a reltrace server for asyncio code.

    The methods of `Client`, awaitable; `trace_many` is an async iterator. A client belongs to
    the event loop on which it is first used.

    Parameters
    ----------
    address : str, optional
        "host:port" of the server; several with commas between, or "dns:///name:port" for every
        address behind a name: calls are spread over them, and go on with the others when one
        dies. Default: environment variable RELTRACE_SERVER, else "127.0.0.1:50051".
    token : str or Path, optional
        The token that a server asks for: the token itself, or a Path of a file that holds it,
        which is read again when it changes. Default: the file that environment variable
        RELTRACE_TOKEN_FILE names, else what RELTRACE_TOKEN holds, else none; "": none.
    tls : bool or TlsOptions, optional
        Whether to use TLS, and how. Default: TLS if one of the environment variables RELTRACE_TLS,
        RELTRACE_TLS_CA, RELTRACE_TLS_CERT, RELTRACE_TLS_KEY and RELTRACE_TLS_NAME is set; with
        True, too, they are the options.
    insecure : bool, optional
        Send the token in plaintext to another machine. Default: environment variable
        RELTRACE_INSECURE, else no.
    retry_timeout : float, default 30
        Seconds to keep calling when no server can be reached or is ready, both at the first call
        and after a connection was lost.

    Raises
    ------
    InvalidArgument
        If the address is of another form, a file of `token` or `tls` can not be read, or the
        token would be sent in plaintext to another machine.

    Examples
    --------
    >>> async with reltrace.AsyncClient() as client:
    ...     trace = await client.trace("My cats love to play with my")
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: Token = None,
        tls: Tls = None,
        insecure: bool | None = None,
        retry_timeout: float = 30.0,
    ) -> None:
        self._connection = Connection(address, retry_timeout, credentials(token, tls, insecure))
        self._background: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """The address of the server, or of several."""
        return self._connection.address

    @property
    def leftovers(self) -> Leftovers:
        """What the server holds for this client; for the clients' own use."""
        return self._connection.leftovers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection.

        Calls that are open end with a `TraceError`; what they left on the server is cancelled.
        """
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_TIMEOUT)
        for task in self._background:
            task.cancel()
        await self._connection.close()

    @overload
    async def trace(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        model: str | None = None,
        sites: str | Sequence[str] = ("resid",),
        reduce: str = "token",
        target: TargetLike = "max",
        rule: str = "attnlrp",
        dtype: Dtype = "float32",
        layers: Sequence[int] | None = None,
        top_k: int | None = None,
        edits: EditLike | Sequence[EditLike] = (),
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Trace: ...
    @overload
    async def trace(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        model: str | None = None,
        sites: str | Sequence[str] = ("resid",),
        reduce: str = "token",
        target: Targets,
        rule: str = "attnlrp",
        dtype: Dtype = "float32",
        layers: Sequence[int] | None = None,
        top_k: int | None = None,
        edits: EditLike | Sequence[EditLike] = (),
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> list[Trace]: ...
    async def trace(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        model: str | None = None,
        sites: str | Sequence[str] = ("resid",),
        reduce: str = "token",
        target: TargetLike | Targets = "max",
        rule: str = "attnlrp",
        dtype: Dtype = "float32",
        layers: Sequence[int] | None = None,
        top_k: int | None = None,
        edits: EditLike | Sequence[EditLike] = (),
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Trace | list[Trace]:
        """Trace one prompt. See `Client.trace`."""
        arguments = Arguments(
            prompt, input_ids, messages, add_special_tokens, model, sites, reduce, target, rule,
            dtype, layers, top_k, None, edits,
        )  # fmt: skip
        return await self.run_trace(arguments, priority, timeout)

    async def run_trace(
        self, arguments: Arguments, priority: Priority, timeout: float | None
    ) -> Trace | list[Trace]:
        """Do what `trace` does with its arguments; for the clients' own use."""
        deadline = Deadline(timeout)
        job = arguments.job()
        entries = [Entry(job, None)]
        answer = await submit(self._connection, entries, deadline, wire_priority(priority))
        if isinstance(answer, Rejected):
            raise answer.errors[0]
        stream = deliveries(self._connection, answer, entries, deadline)
        # One job, one delivery: the stream raises where it can not give it.
        delivery = await anext(stream)
        finish = asyncio.create_task(_drain(stream))
        self._background.add(finish)
        finish.add_done_callback(self._background.discard)
        if isinstance(delivery.outcome, TraceError):
            raise delivery.outcome
        assert isinstance(delivery.outcome, list)
        return delivery.outcome if job.several else delivery.outcome[0]

    @overload
    def trace_many(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        ordered: bool = False,
        progress: bool = False,
        add_special_tokens: bool = True,
        model: str | None = None,
        sites: str | Sequence[str] = ("resid",),
        reduce: str = "token",
        target: TargetLike = "max",
        rule: str = "attnlrp",
        dtype: Dtype = "float32",
        layers: Sequence[int] | None = None,
        top_k: int | None = None,
        output_uri: str | None = None,
        edits: EditLike | Sequence[EditLike] = (),
        max_in_flight: int = 1024,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> AsyncIterator[Trace | Failure]: ...
    @overload
    def trace_many(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        ordered: bool = False,
        progress: bool = False,
        add_special_tokens: bool = True,
        model: str | None = None,
        sites: str | Sequence[str] = ("resid",),
        reduce: str = "token",
        target: Targets,
        rule: str = "attnlrp",
        dtype: Dtype = "float32",
        layers: Sequence[int] | None = None,
        top_k: int | None = None,
        output_uri: str | None = None,
        edits: EditLike | Sequence[EditLike] = (),
        max_in_flight: int = 1024,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> AsyncIterator[list[Trace] | Failure]: ...
    def trace_many(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        ordered: bool = False,
        progress: bool = False,
        add_special_tokens: bool = True,
        model: str | None = None,
        sites: str | Sequence[str] = ("resid",),
        reduce: str = "token",
        target: TargetLike | Targets = "max",
        rule: str = "attnlrp",
        dtype: Dtype = "float32",
        layers: Sequence[int] | None = None,
        top_k: int | None = None,
        output_uri: str | None = None,
        edits: EditLike | Sequence[EditLike] = (),
        max_in_flight: int = 1024,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> AsyncIterator[Any]:
        """Trace many prompts; results come as they finish. See `Client.trace_many`.

        `items` may also be an async iterable.
        """
        defaults = Arguments(
            None, None, None, add_special_tokens, model, sites, reduce, target, rule,
            dtype, layers, top_k, output_uri, edits,
        )  # fmt: skip
        run = self.start_many(
            items,
            defaults,
            ordered=ordered,
            max_in_flight=max_in_flight,
            priority=priority,
            deadline=Deadline(timeout),
        )
        return self._iterate(run, Progress(items, shown=progress))

    def start_many(
        self,
        items: object,
        defaults: Arguments,
        *,
        ordered: bool,
        max_in_flight: int,
        priority: Priority,
        deadline: Deadline,
        pins: Pins | None = None,
    ) -> ManyRun:
        """Check the arguments of `trace_many` and make its run; for the clients' own use.

        Parameters
        ----------
        pins : Pins, optional
            Of a larger run that this one is part of.
        """
        defaults.check_shared()
        return ManyRun(
            self._connection,
            open_source(items),
            defaults,
            ordered=ordered,
            max_in_flight=whole_number(max_in_flight, "max_in_flight", 1),
            priority=wire_priority(priority),
            deadline=deadline,
            pins=pins or Pins(self._connection),
        )

    async def _iterate(self, run: ManyRun, progress: Progress) -> AsyncIterator[Result]:
        try:
            with progress:
                while results := await run.take():
                    for result in results:
                        progress.count(result)
                        yield result
        finally:
            await run.close()


async def _drain(stream: Any) -> None:
    """Read a stream that has delivered to its end, which acknowledges what it delivered."""
    async with aclosing(stream):
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                async for _ in stream:
                    pass
        except (TraceError, TimeoutError):
            # The result is with the caller; unacknowledged, it expires on the server.
            return
