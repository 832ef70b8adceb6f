"""The position in the results of a submission, and what the next message adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reltrace_proto.v1 import trace_pb2

from reltrace.transport.assemble import Assembler, Outcome
from reltrace.types.errors import ProtocolError
from reltrace.types.request import Job


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job that ended: its index in the submission, its outcome, and the bytes of its tensors."""

    index: int
    outcome: Outcome
    bytes: int


class ResultCursor:
    """Takes the results of a submission in the order of the stream.

    `last_entry` is the number of the last entry of the stream that is here as a whole.
    """

    def __init__(self, job_ids: Sequence[str], jobs: Sequence[Job]) -> None:
        self._positions = {job_id: index for index, job_id in enumerate(job_ids)}
        self._jobs = jobs
        self._current: Assembler | None = None
        self._current_id = ""
        self.last_entry = 0

    @property
    def chunks_seen(self) -> int:
        """Number of chunks that are here of the entry after the last one."""
        return 0 if self._current is None else self._current.chunks

    @property
    def unfinished(self) -> list[str]:
        """Ids of the jobs that have not ended."""
        return list(self._positions)

    def index_of(self, job_id: str) -> int | None:
        """Return the index of a job in the submission, or None if it has ended."""
        return self._positions.get(job_id)

    def take(self, event: trace_pb2.ResultEvent) -> JobResult | None:
        """Take the next chunk; return the result of the job that ends with it."""
        chunk = event.chunk
        index = self._positions.get(chunk.job_id)
        if index is None or event.entry <= self.last_entry:
            raise ProtocolError(
                f"entry {event.entry} has results of job {chunk.job_id!r}, which were not asked for"
            )
        if self._current is None:
            self._current = Assembler(self._jobs[index])
            self._current_id = chunk.job_id
        elif self._current_id != chunk.job_id:
            raise ProtocolError(f"chunks of job {chunk.job_id!r} came inside another entry")
        outcome = self._current.add(chunk)
        if outcome is None:
            return None
        size = self._current.bytes
        self._current = None
        self.last_entry = event.entry
        del self._positions[chunk.job_id]
        return JobResult(index, outcome, size)
