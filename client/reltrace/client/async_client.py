"""The asyncio client. `generate.py` makes the synchronous client in `sync_client.py` of it."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack, overload

from reltrace.calls.iteration import iterate
from reltrace.calls.jobs import run_jobs
from reltrace.calls.progress import Progress
from reltrace.calls.trace_many import TraceManyRun
from reltrace.client.async_generate import AsyncGenerate
from reltrace.client.async_queries import AsyncQueries
from reltrace.client.async_studies import AsyncStudies
from reltrace.transport.connection import Connection
from reltrace.transport.retry import Deadline
from reltrace.transport.settings import Tls, Token, credentials
from reltrace.types.edit import EditLike
from reltrace.types.errors import Failure
from reltrace.types.prompt import Messages
from reltrace.types.request import (
    Arguments,
    Dtype,
    Priority,
    TraceManyOptions,
    TraceOptions,
    tokenize_job,
)
from reltrace.types.target import Target, TargetLike
from reltrace.types.tokens import Tokens
from reltrace.types.trace import Trace

Targets: TypeAlias = (
    list[TargetLike] | list[str] | list[int] | list[Target] | tuple[TargetLike, ...]
)
Item: TypeAlias = str | Mapping[str, Any]
Items: TypeAlias = Iterable[Item] | AsyncIterable[Item]


class AsyncClient(AsyncGenerate, AsyncQueries, AsyncStudies):
    """A client of a reltrace server for asyncio code.

    It has the methods of `Client`, awaitable; `trace_many` is an async iterator.
    It belongs to the event loop on which it is first used.

    Parameters
    ----------
    address : str, optional
        "host:port" of the server; several separated by commas, or "dns:///name:port" for all
        addresses of a name: calls are spread over them, and over the others if one dies. Default:
        environment variable RELTRACE_SERVER, else "127.0.0.1:50051".
    token : str or Path, optional
        The token that a server requires, or the Path of a file that holds it, which is read again
        when it changes. Default: the file that environment variable RELTRACE_TOKEN_FILE names,
        else the value of RELTRACE_TOKEN, else none; "": none.
    tls : bool or TlsOptions, optional
        Whether to use TLS, and how. Default: TLS if one of the environment variables RELTRACE_TLS,
        RELTRACE_TLS_CA, RELTRACE_TLS_CERT, RELTRACE_TLS_KEY and RELTRACE_TLS_NAME is set; with
        True, too, they are the options.
    insecure : bool, optional
        Send the token in plaintext to another machine. Default: environment variable
        RELTRACE_INSECURE, else no.
    retry_timeout : float, default 30
        Seconds to keep calling when no server can be reached or is ready, at the first call or
        after a connection was lost. After that calls raise `Unavailable`.

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

    @property
    def address(self) -> str:
        """The address of the server, or of several."""
        return self._connection.address

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

        Open calls end with a `TraceError`, and their jobs are cancelled on the server. In a process
        that was forked from the client's own, the synchronous client does nothing.
        """
        await self._connection.close()

    @overload
    async def trace(
        self,
        prompt: str | None = None,
        *,
        target: TargetLike = "max",
        **options: Unpack[TraceOptions],
    ) -> Trace: ...
    @overload
    async def trace(
        self, prompt: str | None = None, *, target: Targets, **options: Unpack[TraceOptions]
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
        """Trace one prompt.

        Parameters
        ----------
        prompt : str
            Text, encoded by the model's tokenizer.
        messages : sequence of mapping
            A conversation instead of `prompt`: messages with "role" and "content" (a text, or a
            list of text parts in OpenAI's form, which are concatenated). The model's chat template
            turns it into a text that ends with the start of the assistant's next turn.
        input_ids : sequence of int
            Token ids instead of `prompt`, used as they are.
        add_special_tokens : bool, default True
            Put the tokenizer's BOS token in front of `prompt`, unless the text begins with it. An
            EOS token is never appended.
        model : str, optional
            Name of a served model (see `models`); default: the only one.
        sites : str or sequence of str, default ("resid",)
            Where relevance is read: "embed" (input embeddings), "resid" (output of each decoder
            layer), or another site that the model's workers serve. Empty: there is no backward
            pass, and the result has the logit of its target but no relevance.
        reduce : str, default "token"
            What is summed before the result is sent: "token" leaves one value per token,
            "feature" one per feature, "full" everything; "topk" keeps the `top_k` largest |R| of
            each layer (see `Trace.parts`: "values", and "token" and "feature" where they stand).
        target : str, int, Target, or a list of these, default "max"
            What is explained: "max" (the largest logit at the last position), a token's text, a
            token id, or a `Target`. A list gives a trace for each target.
        rule : str, default "attnlrp"
            Propagation rule: "attnlrp", or another one that the model's workers serve.
        dtype : {"float32", "bfloat16", "float16"}
            Number format in which relevance is sent.
        layers : sequence of int, optional
            Decoder layers of the result, in this order, counted from 0; default: all.
        top_k : int, optional
            With ``reduce="topk"``: values per layer, 1 to 4096; a layer with fewer gives all.
        edits : Edit, Steer or a sequence of these, optional
            Applied in this order in the forward pass; relevance is that of the edited model.
        priority : {"interactive", "batch"}
            Priority in the queue: "batch" jobs leave workers to interactive ones.
        timeout : float, optional
            Seconds for the whole call; default: as long as the server takes.

        Returns
        -------
        Trace or list of Trace
            A list if `target` is a list (in its order) or a `Target` with ``each=True`` (one
            trace per response token; inside a list such a target takes several places).

        Raises
        ------
        InvalidArgument
            If an argument is wrong; the message names it and what is allowed.
        ModelNotFound
            If no worker serves the model.
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        DeadlineExceeded
            If `timeout` is over.
        JobFailed
            If the worker failed.

        Notes
        -----
        While the server's queue is full, the call waits. If it ends early (by `timeout` or Ctrl-C),
        its job is cancelled on the server.
        """
        job = Arguments(
            prompt, input_ids, messages, add_special_tokens, model, sites, reduce, target, rule,
            dtype, layers, top_k, None, edits,
        ).job()  # fmt: skip
        (traces,) = await run_jobs(self._connection, [job], priority, timeout)
        assert isinstance(traces, list)
        return traces if job.several else traces[0]

    @overload
    def trace_many(
        self, items: Items, *, target: TargetLike = "max", **options: Unpack[TraceManyOptions]
    ) -> AsyncIterator[Trace | Failure]: ...
    @overload
    def trace_many(
        self, items: Items, *, target: Targets, **options: Unpack[TraceManyOptions]
    ) -> AsyncIterator[list[Trace] | Failure]: ...
    def trace_many(
        self,
        items: Items,
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
        """Trace many prompts, and yield results as they finish.

        Parameters
        ----------
        items : iterable
            Prompts, or mappings of the arguments of `trace` (without `timeout`) plus an
            optional "id" (str or int; default: the item's index), which need not be unique. Pulled
            as needed, in a thread of its own unless it is a list, tuple or async iterable, so that
            it may block.
        ordered : bool, default False
            Yield results in the order of the items.
        progress : bool, default False
            Show a tqdm bar.
        add_special_tokens, model, sites, reduce, target, rule, dtype, layers, top_k, edits
            As in `trace`, for the items that do not set them.
        output_uri : str, optional
            Folder, as a URL such as "s3://bucket/run-1" that the server allows, to which workers
            write tensors instead of sending them. A trace reads its tensors when they are first
            accessed (s3 takes `pip install "reltrace[s3]"`).
        max_in_flight : int, default 1024
            Most items pulled from `items` whose results have not been yielded.
        priority : {"interactive", "batch"}
            As in `trace`.
        timeout : float, optional
            Seconds for the whole run; default: as long as it takes.

        Yields
        ------
        Trace, list of Trace, or Failure
            One per item, with the item's `id`. A list if the item's target is a list or has
            ``each=True``. An item that is invalid or fails yields a `Failure` and does not affect
            the others.

        Raises
        ------
        InvalidArgument
            At once, if an argument is wrong that all items share.
        DeadlineExceeded
            If `timeout` is over.
        Exception
            An exception of `items`, after the results of the items before it.

        Notes
        -----
        If the loop ends early, by `break`, `timeout`, an error or Ctrl-C, no further items are
        pulled, and jobs that have not ended are cancelled on the server. Results are freed on the
        server once they were received.
        """
        defaults = Arguments(
            None, None, None, add_special_tokens, model, sites, reduce, target, rule,
            dtype, layers, top_k, output_uri, edits,
        )  # fmt: skip
        run = TraceManyRun(
            self._connection,
            items,
            defaults,
            ordered=ordered,
            max_in_flight=max_in_flight,
            priority=priority,
            deadline=Deadline(timeout),
        )
        return iterate(run, Progress(items, shown=progress))

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
        model: str | None = None,
        timeout: float | None = None,
    ) -> Tokens:
        """Return a prompt as a model reads it: its tokens, and their positions in its text.

        Parameters
        ----------
        prompt : str
            Text, encoded by the model's tokenizer.
        messages : sequence of mapping
            A conversation instead of `prompt`, as in `trace`.
        add_special_tokens : bool, default True
            As in `trace`.
        model : str, optional
            Name of a served model; default: the only one.
        timeout : float, optional
            Seconds for the whole call; default: as long as the server takes.

        Returns
        -------
        Tokens
            As `trace` of the same prompt has them.

        Raises
        ------
        TraceError
            As `trace` does; `InvalidArgument` also if the model has no chat template.
        """
        job = tokenize_job(prompt, messages, add_special_tokens, model)
        (tokens,) = await run_jobs(self._connection, [job], "interactive", timeout)
        assert isinstance(tokens, Tokens)
        return tokens
