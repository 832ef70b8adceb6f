"""Calls that let a model generate text. `generate.py` makes their synchronous forms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from reltrace.calls.jobs import run_jobs
from reltrace.calls.progress import Progress
from reltrace.calls.text_run import TextRun
from reltrace.client.iteration import iterate
from reltrace.transport.connection import Connection
from reltrace.types.edit import EditLike
from reltrace.types.generation import GenerateArguments, Generation, TextPiece
from reltrace.types.prompt import Messages
from reltrace.types.request import Priority


class AsyncTextStream(AsyncIterator[TextPiece]):
    """The pieces of a text while it is generated: an iterator.

    Steered and unsteered text come mixed, as they are generated. If it is closed, or no longer
    referred to, before the end, the rest is cancelled on the server.
    """

    def __init__(self, run: TextRun) -> None:
        self._run = run
        self._pieces = iterate(run, Progress((), shown=False))

    async def __anext__(self) -> TextPiece:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Read no further; what has not been generated is cancelled."""
        await self._pieces.aclose()

    @property
    def result(self) -> Generation | None:
        """The whole, once all pieces were taken; None before."""
        return self._run.result

    @property
    def job_ids(self) -> tuple[str, ...]:
        """The job, and that of the text without steering; none until the first piece is there."""
        return self._run.job_ids


class AsyncGenerate:
    """The calls of `AsyncClient` that generate text."""

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
        TraceError
            As `trace` does.
        """
        arguments = GenerateArguments(
            prompt, input_ids, messages, add_special_tokens, steer,
            max_new_tokens, temperature, top_p, seed, model,
        )  # fmt: skip
        texts = await run_jobs(self._connection, arguments.jobs(), priority, timeout)
        return Generation.combined(texts)

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
        """Read along while a model goes on with a prompt, as it is and steered.

        Takes what `generate` takes, and raises the same, when pieces are taken.

        Returns
        -------
        AsyncTextStream
            An iterator of `TextPiece`; at its end `result` is what `generate` returns.

        Examples
        --------
        >>> async for piece in client.generate_stream("My cats love to play with my"):
        ...     print(piece.text, end="", flush=True)
        """
        arguments = GenerateArguments(
            prompt, input_ids, messages, add_special_tokens, steer,
            max_new_tokens, temperature, top_p, seed, model,
        )  # fmt: skip
        jobs = arguments.jobs(stream=True)
        return AsyncTextStream(TextRun(self._connection, jobs, priority, timeout))
