"""Calls that let a model generate text. `generate.py` makes their synchronous forms."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from reltrace.calls.iteration import iterate
from reltrace.calls.jobs import run_jobs
from reltrace.calls.progress import Progress
from reltrace.calls.text_run import TextRun
from reltrace.transport.connection import Connection
from reltrace.types.edit import EditLike
from reltrace.types.generation import Generation, TextPiece, generation_jobs
from reltrace.types.prompt import Messages
from reltrace.types.request import Priority


class AsyncTextStream(AsyncIterator[TextPiece]):
    """An iterator over the pieces of a text while it is generated.

    Pieces of steered and unsteered text are mixed. If the iterator is closed, or no longer
    referred to, before its end, the jobs are cancelled on the server.
    """

    def __init__(self, run: TextRun) -> None:
        self._run = run
        self._pieces = iterate(run, Progress((), shown=False))

    async def __anext__(self) -> TextPiece:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Stop reading, and cancel the jobs that have not ended."""
        await self._pieces.aclose()

    @property
    def result(self) -> Generation | None:
        """The complete generation once all pieces were taken; None before."""
        return self._run.result

    @property
    def job_ids(self) -> tuple[str, ...]:
        """Ids of the job and of the one without steering; empty before the first piece."""
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
        """Let a model continue a prompt, with and without steering.

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
            Applied in this order at every token, of the prompt and of the generated text. The text
            without them is generated too, in the same batch.
        max_new_tokens : int, default 64
            Most tokens to generate, 1 to 1024.
        temperature : float, default 0
            0: always the token with the largest logit; otherwise tokens are sampled from the logits
            divided by this.
        top_p : float, default 0
            Sample from the likeliest tokens whose probabilities add up to this; 0: from all.
        seed : int, default 0
            Seed of the sampling. The same seed gives the same text, unless numbers are rounded
            differently in another batch, which often changes a sample in bfloat16.
        model : str, optional
            Name of a served model; default: the only one.
        priority : {"interactive", "batch"}
            As in `trace`.
        timeout : float, optional
            Seconds for the whole call; default: as long as the server takes.

        Returns
        -------
        Generation
            With the text without steering in `unsteered`, if anything was steered.

        Raises
        ------
        TraceError
            As `trace` does.
        """
        jobs = generation_jobs(
            prompt, input_ids, messages, add_special_tokens, steer,
            max_new_tokens, temperature, top_p, seed, model,
        )  # fmt: skip
        texts = await run_jobs(self._connection, jobs, priority, timeout)
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
        """Read the text of `generate` while it is generated.

        Takes the same arguments. Errors of the server are raised when pieces are taken.

        Returns
        -------
        AsyncTextStream
            An iterator of `TextPiece`; at its end `result` is what `generate` returns.

        Examples
        --------
        >>> async for piece in client.generate_stream("My cats love to play with my"):
        ...     print(piece.text, end="", flush=True)
        """
        jobs = generation_jobs(
            prompt, input_ids, messages, add_special_tokens, steer,
            max_new_tokens, temperature, top_p, seed, model, stream=True,
        )  # fmt: skip
        return AsyncTextStream(TextRun(self._connection, jobs, priority, timeout))
