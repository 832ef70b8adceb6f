"""Letting a model write, as it is and steered: at once, or while it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reltrace.client.loop_thread import LoopThread
from reltrace.client.text_stream import AsyncTextStream, TextStream
from reltrace.transport.call import outcomes
from reltrace.transport.connection import Connection, Deadline
from reltrace.transport.submission import Entry
from reltrace.types.edit import EditLike
from reltrace.types.generation import Generation, Writing
from reltrace.types.prompt import Messages
from reltrace.types.request import Priority, wire_priority


class AsyncGenerate:
    """See `Generate`."""

    _connection: Connection

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        steer: EditLike | Sequence[EditLike] = (),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 0.0,
        seed: int = 0,
        model: str | None = None,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Generation:
        """Let a model go on with a prompt. See `Client.generate`."""
        writing = Writing(
            prompt, input_ids, messages, add_special_tokens, steer,
            max_new_tokens, temperature, top_p, seed, model,
        )  # fmt: skip
        deadline = Deadline(timeout)
        found: list[Generation] = []
        for outcome in await outcomes(
            self._connection, writing.jobs(), wire_priority(priority), deadline
        ):
            assert isinstance(outcome, Generation)
            found.append(outcome)
        return replace(found[0], unsteered=found[1] if len(found) > 1 else None)

    def generate_stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        steer: EditLike | Sequence[EditLike] = (),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 0.0,
        seed: int = 0,
        model: str | None = None,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> AsyncTextStream:
        """Read along while a model goes on with a prompt. See `Client.generate_stream`."""
        writing = Writing(
            prompt, input_ids, messages, add_special_tokens, steer,
            max_new_tokens, temperature, top_p, seed, model,
        )  # fmt: skip
        entries = [Entry(job, None) for job in writing.jobs(stream=True)]
        return AsyncTextStream(
            self._connection, entries, wire_priority(priority), Deadline(timeout)
        )


class Generate:
    """What `Client` does to let a model write."""

    _client: AsyncGenerate
    _loop: LoopThread

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        steer: EditLike | Sequence[EditLike] = (),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 0.0,
        seed: int = 0,
        model: str | None = None,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> Generation:
        """Let a model go on with a prompt, as it is and steered.

        Parameters
        ----------
        prompt : str
            Text, encoded by the model's tokenizer.
        messages : sequence of mapping
            A conversation instead of `prompt`, as in `trace`.
        input_ids : sequence of int
            Token ids instead of `prompt`, used as they are.
        add_special_tokens : bool, default True
            As in `trace`.
        steer : Steer, Edit or a sequence of these, optional
            Made in this order for every token, of the prompt and of what is written. The same text
            without them is written as well, in the same batch.
        max_new_tokens : int, default 64
            At most so many tokens, 1 to 1024.
        temperature : float, default 0
            0: always the token with the largest logit; else logits are divided by it and drawn
            from.
        top_p : float, default 0
            Draw from the likeliest tokens that have this much probability together; 0: from all.
        seed : int, default 0
            Of the draws: the same seed gives the same text, but for how the model's numbers are
            rounded beside other texts. In bfloat16 that often decides a draw.
        model : str, optional
            Name of a served model; default: the only one.
        priority : {"interactive", "batch"}
            Who goes first where jobs wait.
        timeout : float, optional
            Seconds for the whole call; default: as long as the server takes.

        Returns
        -------
        Generation
            With what the model writes unsteered in `unsteered`, if anything was steered.

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
        """
        return self._loop.run(
            self._client.generate(
                prompt,
                messages=messages,
                input_ids=input_ids,
                add_special_tokens=add_special_tokens,
                steer=steer,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                model=model,
                priority=priority,
                timeout=timeout,
            )
        )

    def generate_stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        steer: EditLike | Sequence[EditLike] = (),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 0.0,
        seed: int = 0,
        model: str | None = None,
        priority: Priority = "interactive",
        timeout: float | None = None,
    ) -> TextStream:
        """Read along while a model goes on with a prompt, as it is and steered.

        Takes what `generate` takes, and raises the same, when pieces are taken.

        Returns
        -------
        TextStream
            An iterator of `TextPiece`; at its end `result` is what `generate` returns.

        Examples
        --------
        >>> for piece in client.generate_stream("My cats love to play with my"):
        ...     print(piece.text, end="", flush=True)
        """
        return TextStream(
            self._client.generate_stream(
                prompt,
                messages=messages,
                input_ids=input_ids,
                add_special_tokens=add_special_tokens,
                steer=steer,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                model=model,
                priority=priority,
                timeout=timeout,
            ),
            self._loop,
        )
