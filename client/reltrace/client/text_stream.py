"""Text that is read while a model writes it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from reltrace_proto.v1 import types_pb2

from reltrace.client.loop_thread import LoopThread
from reltrace.transport.connection import Connection, Deadline
from reltrace.transport.cursor import Draft
from reltrace.transport.submission import Entry, Rejected, deliveries, submit
from reltrace.types.errors import TraceError
from reltrace.types.generation import Generation


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What a model wrote since the last piece.

    Attributes
    ----------
    text : str
        Decoded: the pieces of a text together are its `Generation.text`. Empty while a character is
        not complete.
    tokens, token_ids : tuple of str, tuple of int
        The new tokens.
    steered : bool
        Whether it is of the steered text, or of the other.
    again : bool
        The text begins again with this piece: a worker was lost, and another wrote something else.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    steered: bool
    again: bool = False


@dataclass(slots=True)
class _Text:
    """A text as it stands on the server."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def begins(self, other: _Text) -> bool:
        """Tell whether another text goes on from this one."""
        same = other.token_ids[: len(self.token_ids)] == self.token_ids
        return same and other.text.startswith(self.text)


class _Along:
    """Reads along with one text, whatever is missing and however often it is begun."""

    def __init__(self, *, steered: bool) -> None:
        self._steered = steered
        self._attempt = 0
        self._known = _Text()
        self._given = _Text()

    def draft(self, draft: Draft) -> TextPiece | None:
        """Take a draft; return what is new."""
        if draft.attempt < self._attempt:
            return None
        # Another attempt, and another connection of ours or of the worker's, begin again.
        if draft.attempt > self._attempt or draft.first == 0:
            self._attempt, self._known = draft.attempt, _Text()
        known = self._known
        # One that is missing is made up for when the text begins again, or by the result.
        if draft.first != len(known.token_ids):
            return None
        known.text += draft.text
        known.tokens += draft.tokens
        known.token_ids += draft.token_ids
        return None if known.begins(self._given) else self._further(known)

    def result(self, found: Generation) -> TextPiece | None:
        """Take the whole text; return what was not given out."""
        whole = _Text(found.text, found.tokens, found.token_ids)
        return None if whole == self._given else self._further(whole)

    def _further(self, known: _Text) -> TextPiece:
        given, again = self._given, not self._given.begins(known)
        if again:
            given = _Text()
        self._given = _Text(known.text, list(known.tokens), list(known.token_ids))
        done = len(given.token_ids)
        return TextPiece(
            known.text[len(given.text) :],
            tuple(known.tokens[done:]),
            tuple(known.token_ids[done:]),
            self._steered,
            again,
        )


class _State:
    """What was read, and what nobody has taken yet: at most the texts' tokens."""

    def __init__(self) -> None:
        self.pieces: deque[TextPiece] = deque()
        self.news = asyncio.Event()
        self.results: dict[int, Generation] = {}
        self.job_ids: tuple[str, ...] = ()

    def add(self, piece: TextPiece | None) -> None:
        if piece is not None:
            self.pieces.append(piece)
            self.news.set()


async def _read(
    connection: Connection,
    entries: Sequence[Entry],
    priority: types_pb2.Priority.ValueType,
    deadline: Deadline,
    state: _State,
) -> None:
    """Hand jobs in, and read along until they have ended."""
    # The first is what was asked for, the second, if there is one, the same without steering.
    texts = [_Along(steered=index == 0 and len(entries) > 1) for index in range(len(entries))]
    try:
        answer = await submit(connection, entries, deadline, priority)
        if isinstance(answer, Rejected):
            raise next(iter(answer.errors.values()))
        state.job_ids = tuple(answer.positions)

        def note(draft: Draft) -> None:
            state.add(texts[draft.index].draft(draft))

        results = deliveries(connection, answer, entries, deadline, drafts=note)
        async with aclosing(results) as stream:
            async for delivery in stream:
                if isinstance(delivery.outcome, TraceError):
                    raise delivery.outcome
                assert isinstance(delivery.outcome, Generation)
                state.add(texts[delivery.index].result(delivery.outcome))
                state.results[delivery.index] = delivery.outcome
    finally:
        state.news.set()


async def _pieces(
    connection: Connection,
    entries: Sequence[Entry],
    priority: types_pb2.Priority.ValueType,
    deadline: Deadline,
    state: _State,
) -> AsyncGenerator[TextPiece, None]:
    reading = asyncio.create_task(_read(connection, entries, priority, deadline, state))
    try:
        while True:
            over = reading.done()
            while state.pieces:
                yield state.pieces.popleft()
            if over:
                reading.result()
                return
            await state.news.wait()
            state.news.clear()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class AsyncTextStream(AsyncIterator[TextPiece]):
    """The pieces of a text while it is written. See `TextStream`."""

    def __init__(
        self,
        connection: Connection,
        entries: Sequence[Entry],
        priority: types_pb2.Priority.ValueType,
        deadline: Deadline,
    ) -> None:
        self._state = _State()
        # Whoever forgets it mid-text drops the generator too, and the loop then closes that.
        self._generator = _pieces(connection, entries, priority, deadline, self._state)

    async def __anext__(self) -> TextPiece:
        return await self._generator.__anext__()

    async def aclose(self) -> None:
        """Read no further; what is not written is cancelled."""
        await self._generator.aclose()

    @property
    def result(self) -> Generation | None:
        """The whole, once all pieces were taken; None before."""
        found = self._state.results
        if 0 not in found or self._state.pieces:
            return None
        return replace(found[0], unsteered=found.get(1))

    @property
    def job_ids(self) -> tuple[str, ...]:
        """The job, and that of the text without steering; none until the first piece is there."""
        return self._state.job_ids


class TextStream(Iterator[TextPiece]):
    """The pieces of a text while it is written: an iterator.

    Steered and unsteered text come mixed, as they are written. Who stops before the end and
    calls `close`, or forgets the stream, cancels the rest.
    """

    def __init__(self, stream: AsyncTextStream, loop: LoopThread) -> None:
        self._stream = stream
        self._pieces = _taken(stream, loop)

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    def close(self) -> None:
        """Read no further; what is not written is cancelled."""
        self._pieces.close()

    @property
    def result(self) -> Generation | None:
        """The whole, once all pieces were taken; None before."""
        return self._stream.result

    @property
    def job_ids(self) -> tuple[str, ...]:
        """The job, and that of the text without steering; none until the first piece is there."""
        return self._stream.job_ids


def _taken(stream: AsyncTextStream, loop: LoopThread) -> Generator[TextPiece, None, None]:
    async def take() -> TextPiece | None:
        return await anext(stream, None)

    try:
        while (piece := loop.run(take())) is not None:
            yield piece
    finally:
        loop.finish(stream.aclose())
