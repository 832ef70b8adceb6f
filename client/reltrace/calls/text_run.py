"""Streams texts while they are generated."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from reltrace_proto.v1 import types_pb2

from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.transport.results import stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import Rejected, submit
from reltrace.types.errors import TraceError
from reltrace.types.generation import Generation, TextPiece
from reltrace.types.request import Job, Priority, wire_priority


@dataclass(slots=True)
class _Text:
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def is_prefix_of(self, other: _Text) -> bool:
        same = other.token_ids[: len(self.token_ids)] == self.token_ids
        return same and other.text.startswith(self.text)


class DraftMerger:
    """Merges the drafts of one text into pieces. Any draft may be missing or repeated."""

    def __init__(self, *, steered: bool) -> None:
        self._steered = steered
        self._job_id = ""
        self._attempt = 0
        self._received = _Text()
        self._returned = _Text()

    def draft(self, draft: types_pb2.Draft) -> TextPiece | None:
        """Take a draft; return what it adds to the pieces."""
        if draft.job_id != self._job_id:
            # The server had lost the job, and it was submitted again.
            self._job_id, self._attempt = draft.job_id, 0
        if draft.attempt < self._attempt:
            return None
        # Another attempt, or another connection, sends the text from its beginning.
        if draft.attempt > self._attempt or draft.first == 0:
            self._attempt, self._received = draft.attempt, _Text()
        received = self._received
        # The missing tokens come when the text is sent again, or with the result.
        if draft.first != len(received.token_ids):
            return None
        received.text += draft.text
        received.tokens += draft.tokens
        received.token_ids += draft.token_ids
        return None if received.is_prefix_of(self._returned) else self._next_piece(received)

    def result(self, generation: Generation) -> TextPiece | None:
        """Take the whole text; return what it adds to the pieces."""
        whole = _Text(generation.text, generation.tokens, generation.token_ids)
        return None if whole == self._returned else self._next_piece(whole)

    def _next_piece(self, text: _Text) -> TextPiece:
        returned, again = self._returned, not self._returned.is_prefix_of(text)
        if again:
            returned = _Text()
        self._returned = _Text(text.text, list(text.tokens), list(text.token_ids))
        count = len(returned.token_ids)
        return TextPiece(
            text.text[len(returned.text) :],
            tuple(text.tokens[count:]),
            tuple(text.token_ids[count:]),
            self._steered,
            again,
        )


class TextRun:
    """Generates a text, or a steered and an unsteered one, and returns pieces of them.

    There are at most as many pieces as tokens, so that those which wait need no bound.
    """

    def __init__(
        self, connection: Connection, jobs: Sequence[Job], priority: Priority, timeout: float | None
    ) -> None:
        self._connection = connection
        self._jobs = jobs
        self._priority = wire_priority(priority)
        self._deadline = Deadline(timeout)
        self._reading: asyncio.Task[None] | None = None
        self._pieces: deque[TextPiece] = deque()
        self._changed = asyncio.Event()
        self._results: dict[int, Generation] = {}
        self._submission: Submission | None = None

    @property
    def job_ids(self) -> tuple[str, ...]:
        return () if self._submission is None else tuple(self._submission.job_ids)

    @property
    def result(self) -> Generation | None:
        """The complete generation once all pieces were taken; None before."""
        if 0 not in self._results or self._pieces:
            return None
        return Generation.combined([text for _, text in sorted(self._results.items())])

    async def take(self) -> list[TextPiece]:
        """Return the next piece; an empty list at the end."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        while True:
            ended = self._reading.done()
            if self._pieces:
                return [self._pieces.popleft()]
            if ended:
                self._reading.result()
                return []
            await self._changed.wait()
            self._changed.clear()

    async def close(self) -> None:
        """Stop reading, and cancel the jobs that have not ended."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        # Of two jobs the first is steered, the second is the same without steering.
        steered = len(self._jobs) > 1
        mergers = [DraftMerger(steered=steered and index == 0) for index in range(len(self._jobs))]
        try:
            answer = await submit(self._connection, self._jobs, self._deadline, self._priority)
            if isinstance(answer, Rejected):
                raise next(iter(answer.errors.values()))
            self._submission = answer
            stream = stream_results(
                self._connection,
                answer,
                self._jobs,
                self._deadline,
                on_draft=lambda index, draft: self._add(mergers[index].draft(draft)),
            )
            async with aclosing(stream):
                async for result in stream:
                    if isinstance(result.outcome, TraceError):
                        raise result.outcome
                    assert isinstance(result.outcome, Generation)
                    self._add(mergers[result.index].result(result.outcome))
                    self._results[result.index] = result.outcome
        finally:
            self._changed.set()

    def _add(self, piece: TextPiece | None) -> None:
        if piece is not None:
            self._pieces.append(piece)
            self._changed.set()
