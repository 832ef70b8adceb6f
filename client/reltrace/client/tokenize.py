"""Asking how a model reads a prompt."""

from __future__ import annotations

from reltrace_proto.v1 import types_pb2

from reltrace.client.loop_thread import LoopThread
from reltrace.transport.call import outcomes
from reltrace.transport.connection import Connection, Deadline
from reltrace.types.prompt import Messages, set_input
from reltrace.types.request import Job, model_name
from reltrace.types.tokens import Tokens


class AsyncTokenize:
    """See `Tokenize`."""

    _connection: Connection

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
        model: str | None = None,
        timeout: float | None = None,
    ) -> Tokens:
        """Return a prompt as a model reads it. See `Client.tokenize`."""
        spec = types_pb2.JobSpec(model=model_name(model), tokenize_only=True)
        set_input(spec, prompt, None, messages, add_special_tokens)
        (found,) = await outcomes(
            self._connection,
            [Job(spec, (), False, None)],
            types_pb2.PRIORITY_INTERACTIVE,
            Deadline(timeout),
        )
        assert isinstance(found, Tokens)
        return found


class Tokenize:
    """What `Client` does to read a prompt as a model does."""

    _client: AsyncTokenize
    _loop: LoopThread

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
        model: str | None = None,
        timeout: float | None = None,
    ) -> Tokens:
        """Return a prompt as a model reads it: its tokens, and where they stand in its text.

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
            What `trace` of the same prompt has.

        Raises
        ------
        InvalidArgument
            If an argument is wrong, or the model has no chat template; the message names it.
        ModelNotFound
            If no worker serves the model.
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        DeadlineExceeded
            If `timeout` is over.
        JobFailed
            If the worker failed.
        """
        return self._loop.run(
            self._client.tokenize(
                prompt,
                messages=messages,
                add_special_tokens=add_special_tokens,
                model=model,
                timeout=timeout,
            )
        )
