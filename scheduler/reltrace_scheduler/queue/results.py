"""Results of ended jobs, read in order and freed once the client has them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.queue import milliseconds
from reltrace_scheduler.queue.scripts import Scripts
from reltrace_scheduler.records import StoredChunk

_KEY_OUTLIVES_RESULTS = 600_000
"""Milliseconds: longer than a client goes on repeating one call."""

_PAGE = 128
"""Entries read at a time; inline chunks are at most 64 KiB, so a page is at most 8 MiB."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a submission is."""

    tenant: str
    jobs: int
    ended: int


class Results:
    """The results stream of each submission."""

    def __init__(self, redis: Redis, settings: Settings, keys: Keys) -> None:
        self._redis = redis
        self._settings = settings
        self._keys = keys
        self._scripts = Scripts(redis, keys)

    async def progress(self, submission_id: str) -> Progress | None:
        """Return how far a submission is; None when it is unknown."""
        row: Any = await self._redis.hmget(
            self._keys.submission(submission_id), "tenant", "jobs", "ended"
        )
        return Progress(row[0].decode(), int(row[1]), int(row[2])) if row[0] is not None else None

    async def read(
        self, submission_id: str, after_entry: int, after_chunk: int
    ) -> AsyncIterator[StoredChunk]:
        """Yield what is there after a position, in order: the same bytes every time.

        Parameters
        ----------
        after_entry : int
            The last entry that was read whole; 0: none.
        after_chunk : int
            How many chunks of the entry after that were read.
        """
        stream = self._keys.results(submission_id)
        while True:
            page: Any = await self._redis.xrange(stream, f"({after_entry}-0", "+", count=_PAGE)
            for entry_id, fields in page:
                entry = int(entry_id.partition(b"-")[0])
                skip, after_chunk = after_chunk, 0
                if b"c" in fields:
                    if skip == 0:
                        yield StoredChunk(entry, 1, fields[b"c"])
                else:
                    async for chunk in self._read_list(entry, fields[b"l"], skip):
                        yield chunk
                after_entry = entry
            if len(page) < _PAGE:
                return

    async def _read_list(self, entry: int, key: bytes, skip: int) -> AsyncIterator[StoredChunk]:
        # One chunk at a time: what the reader has not taken stays in Redis.
        number = skip
        while True:
            data: Any = await self._redis.lindex(key.decode(), number)
            if data is None:
                return
            number += 1
            yield StoredChunk(entry, number, data)

    async def acknowledge(self, submission_id: str, through_entry: int) -> int:
        """Free results up to and including an entry; return how many there were."""
        total = 0
        while True:
            freed = await self._scripts(
                "acknowledge",
                [
                    self._keys.results(submission_id),
                    self._keys.submission(submission_id),
                    self._keys.parked(submission_id),
                    self._keys.expiring,
                ],
                through_entry,
                self._settings.max_unread,
                _KEY_OUTLIVES_RESULTS,
                _PAGE,
                milliseconds(self._settings.result_ttl),
            )
            total += int(freed)
            if int(freed) < _PAGE:
                return total
