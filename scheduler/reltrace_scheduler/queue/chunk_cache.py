"""Chunks of large results that were stored a moment ago, for readers at the same scheduler."""

import time
from typing import NamedTuple

from reltrace_scheduler.keys import submission_of
from reltrace_scheduler.records import NewChunk

_MAX_BYTES = 64 << 20
"""What readers have not taken when this is full, they read from Redis."""

_MAX_AGE = 5.0
"""Seconds for which chunks are kept for a reader that is slow, and keep others out."""


class ChunkName(NamedTuple):
    """With the worker: a Redis that lost its last second may give the attempt to another one."""

    job_id: str
    attempt: int
    worker: str
    number: int


class ChunkCache:
    """Each chunk is given once; what is not here is in Redis."""

    def __init__(self) -> None:
        self._bytes = 0
        # The oldest first.
        self._chunks: dict[ChunkName, tuple[float, bytes]] = {}

    def add(self, worker: str, chunk: NewChunk) -> None:
        """Keep a chunk that Redis has stored, if there is room for it."""
        now = time.monotonic()
        while self._chunks and self._age(first := next(iter(self._chunks)), now) > _MAX_AGE:
            self._pop(first)
        if self._bytes + len(chunk.data) > _MAX_BYTES:
            return
        name = ChunkName(chunk.lease.job_id, chunk.lease.attempt, worker, chunk.number)
        # It may have been sent again.
        self._pop(name)
        self._chunks[name] = (now, chunk.data)
        self._bytes += len(chunk.data)

    def take(self, name: ChunkName) -> bytes | None:
        """Return a chunk, which is not kept any longer; None: read it from Redis."""
        if name not in self._chunks:
            return None
        is_old = self._age(name, time.monotonic()) > _MAX_AGE
        data = self._pop(name)
        return None if is_old else data

    def drop(self, submission: str) -> None:
        """Forget the chunks of a submission, which has no reader any more."""
        for name in [name for name in self._chunks if submission_of(name.job_id) == submission]:
            self._pop(name)

    def _age(self, name: ChunkName, now: float) -> float:
        return now - self._chunks[name][0]

    def _pop(self, name: ChunkName) -> bytes | None:
        if name not in self._chunks:
            return None
        _, data = self._chunks.pop(name)
        self._bytes -= len(data)
        return data
