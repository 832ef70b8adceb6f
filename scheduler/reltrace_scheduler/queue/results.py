"""Results of ended jobs and drafts of texts, read in order and freed once the client has them."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import ResultLostError
from reltrace_scheduler.keys import submission_of
from reltrace_scheduler.queue.bounds import Bounds
from reltrace_scheduler.queue.chunk_cache import ChunkCache, ChunkName
from reltrace_scheduler.queue.shards import Shards, milliseconds
from reltrace_scheduler.records import Lease, NewChunk, Progress, StoredChunk, StoredDraft

_IDEMPOTENCY_TTL = 600.0
"""Seconds that a key is kept after its results: longer than a client repeats one call."""

_CANCELLED_TTL = 60.0
"""Seconds that results of a cancelled submission are kept, for a reader that follows to the end."""

_PAGE, _FIRST_PAGE = 128, 16
"""Entries read at a time, and of the first read: inline chunks are at most 64 KiB."""

_PAGE_BYTES = 1 << 20
"""What a page is to have: Redis needs memory for the reply of each reader."""

FIRST_DRAFT = "0"
"""The position before the first draft."""

_DRAFT_TTL = 60.0
"""Seconds after the last draft of an attempt; drafts are deleted with the lease anyway."""

_DRAFT_BYTES = 1 << 20
"""Of an attempt: ten times what a text of 1,024 tokens needs, token by token."""

_DRAFT_OVERHEAD = 64
"""Bytes that Redis needs for a draft beside its content: empty ones are not free."""


class Results:
    """The results stream of each submission, and the drafts of its jobs."""

    def __init__(self, shards: Shards, settings: Settings, bounds: Bounds) -> None:
        self._shards = shards
        self._redis = shards.redis
        self._settings = settings
        self._bounds = bounds
        self.open_streams: Counter[str] = Counter()
        """Streams of results that are open at this scheduler, by submission."""
        self._cache = ChunkCache()

    def note_stored(self, worker: str, chunk: NewChunk) -> None:
        """Keep a chunk that was stored for the reader that waits for it here, if there is one."""
        if not chunk.is_inline and submission_of(chunk.lease.job_id) in self.open_streams:
            self._cache.add(worker, chunk)

    async def progress(self, submission: str) -> Progress | None:
        """Return how far a submission is; None when it is unknown."""
        name = self._shards.of(submission).key("submission", submission)
        row: Any = await self._redis.hmget(name, "tenant", "jobs", "ended")
        tenant, jobs, ended = row
        return None if tenant is None else Progress(tenant.decode(), int(jobs), int(ended))

    async def read(
        self, submission: str, after_entry: int, after_chunk: int
    ) -> AsyncIterator[StoredChunk]:
        """Yield the chunks after an entry and `after_chunk` chunks of the next one.

        Raises
        ------
        ResultLostError
            An entry has no such chunks any more.
        """
        stream = self._shards.of(submission).key("results", submission)
        entries = _FIRST_PAGE
        while True:
            page: Any = await self._redis.xrange(stream, f"({after_entry}-0", "+", count=entries)
            size = sum(len(fields.get(b"c", b"")) for _, fields in page)
            for entry_id, fields in page:
                entry = int(entry_id.partition(b"-")[0])
                skip, after_chunk = after_chunk, 0
                if b"l" in fields:
                    async for chunk in self._read_list(entry, fields, skip):
                        yield chunk
                elif skip == 0:
                    yield StoredChunk(entry, fields[b"c"])
                after_entry = entry
            if len(page) < entries:
                return
            entries = _PAGE_BYTES * len(page) // max(1, size)
            entries = min(max(_FIRST_PAGE, entries), _PAGE)

    async def _read_list(
        self, entry: int, fields: Mapping[bytes, bytes], skip: int
    ) -> AsyncIterator[StoredChunk]:
        key, job = fields[b"l"].decode(), fields[b"j"].decode()
        # Entries from before schedulers kept chunks name no worker.
        worker, attempt = fields.get(b"w", b"").decode(), int(key.rpartition(":")[2])
        # One chunk at a time: what the reader has not taken stays in Redis.
        for number in count(skip):
            data: Any = self._cache.take(ChunkName(job, attempt, worker, number + 1))
            if data is None:
                data = await self._redis.lindex(key, number)
            if data is not None:
                yield StoredChunk(entry, data)
            elif number == skip and (not skip or await self._redis.llen(key) < skip):
                raise ResultLostError(entry)
            else:
                return

    @asynccontextmanager
    async def reading(self, submission: str) -> AsyncIterator[None]:
        """Count a stream of a submission's results while it is open."""
        self.open_streams[submission] += 1
        try:
            yield
        finally:
            self.open_streams[submission] -= 1
            if not self.open_streams[submission]:
                del self.open_streams[submission]
                self._cache.drop(submission)

    async def acknowledge(self, submission: str, through_entry: int) -> int:
        """Free results up to and including an entry; return how many there were."""
        shard, total = self._shards.of(submission), 0
        while True:
            freed = await shard.run(
                "acknowledge",
                [
                    shard.key("results", submission),
                    shard.key("submission", submission),
                    shard.key("backpressured", submission),
                ],
                through_entry,
                self._bounds.max_unread,
                milliseconds(_IDEMPOTENCY_TTL),
                _PAGE,
                milliseconds(self._settings.result_ttl),
            )
            total += int(freed)
            if int(freed) < _PAGE:
                return total

    async def expire_soon(self, submission: str) -> None:
        """Have the results of a submission that has ended expire soon."""
        shard = self._shards.of(submission)
        at = await shard.now() + milliseconds(_CANCELLED_TTL)
        await self._redis.zadd(shard.key("expiring"), {submission: at}, xx=True, lt=True)

    async def write_drafts(self, worker: str, drafts: Sequence[tuple[Lease, bytes]]) -> int:
        """Keep serialized ``Draft`` of jobs that are leased to the worker; return how many.

        They are a preview of the results: if one is dropped, the result is still complete.
        """
        rows = [(lease.job_id, lease.attempt, data) for lease, data in drafts]
        ttl = milliseconds(_DRAFT_TTL)
        return sum(
            await self._shards.run("draft", rows, worker, ttl, _DRAFT_BYTES, _DRAFT_OVERHEAD)
        )

    async def read_drafts(self, after: Mapping[str, str]) -> dict[str, list[StoredDraft]]:
        """Return further drafts of the present attempts of jobs, at most 1 MiB of each.

        `after` has the position of each job's last draft that was read, or `FIRST_DRAFT`. It stays
        valid when another attempt begins.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            for job, position in after.items():
                pipe.xrange(self._shards.of(job).key("draft", job), f"({position}", "+")
            rows: list[Any] = await pipe.execute()
        return {
            job: [StoredDraft(position.decode(), fields[b"d"]) for position, fields in row]
            for job, row in zip(after, rows, strict=True)
            if row
        }
