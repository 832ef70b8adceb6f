"""What comes of a submission: chunks put together job by job, and drafts of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace.transport.assemble import Assembler, Outcome
from reltrace.types.errors import ProtocolError

if TYPE_CHECKING:
    from reltrace.transport.submission import Entry


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job that ended.

    Attributes
    ----------
    index : int
        Of the job in the submission.
    outcome : list of Trace, Generation, Tokens, AtlasPart or TraceError
        One trace per target, or what else was asked for, or why there is none.
    bytes : int
        Size of the tensors.
    """

    index: int
    outcome: Outcome
    bytes: int


@dataclass(frozen=True, slots=True)
class Draft:
    """What a job has written since its last draft. One may be missing.

    Attributes
    ----------
    index : int
        Of the job in the submission.
    attempt : int
        Another one begins again.
    first : int
        Index of the first of these tokens in the text.
    token_ids, tokens : tuple of int, tuple of str
        The tokens.
    text : str
        What they add to the decoded text.
    """

    index: int
    attempt: int
    first: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str


class Reader:
    """Where in the results of a submission we are.

    Parameters
    ----------
    positions : mapping of str to int
        Of the jobs in the submission, by their ids.
    entries : sequence of Entry
        The jobs.
    """

    def __init__(self, positions: Mapping[str, int], entries: Sequence[Entry]) -> None:
        self._positions = dict(positions)
        self._entries = entries
        self._current: Assembler | None = None
        self._current_job = ""
        self.last_entry = 0

    @property
    def chunks_seen(self) -> int:
        """How many chunks of the entry after the last whole one are here."""
        return 0 if self._current is None else self._current.chunks

    @property
    def missing(self) -> int:
        """How many jobs have not ended."""
        return len(self._positions)

    @property
    def unfinished(self) -> list[str]:
        """The jobs that have not ended."""
        return list(self._positions)

    def draft(self, draft: types_pb2.Draft) -> Draft | None:
        """Return a draft of a job that has not ended."""
        index = self._positions.get(draft.job_id)
        if index is None:
            return None
        return Draft(
            index,
            draft.attempt,
            draft.first,
            tuple(draft.token_ids),
            tuple(draft.tokens),
            draft.text,
        )

    def take(self, event: trace_pb2.ResultEvent) -> Delivery | None:
        """Take the next chunk; return the job that ends with it."""
        chunk = event.chunk
        index = self._positions.get(chunk.job_id)
        if index is None or event.entry <= self.last_entry:
            raise ProtocolError(f"entry {event.entry} delivers job {chunk.job_id!r} unasked")
        if self._current is None:
            self._current = Assembler(self._entries[index].job, self._entries[index].id)
            self._current_job = chunk.job_id
        elif self._current_job != chunk.job_id:
            raise ProtocolError(f"chunks of job {chunk.job_id!r} came inside another entry")
        outcome = self._current.add(chunk)
        if outcome is None:
            return None
        size = self._current.bytes
        self._current = None
        self.last_entry = event.entry
        del self._positions[chunk.job_id]
        return Delivery(index, outcome, size)
