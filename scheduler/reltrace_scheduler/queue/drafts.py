"""Drafts of texts that are being written: from workers to whoever reads along."""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.scripts import Scripts
from reltrace_scheduler.records import NewDraft, StoredDraft

START = "0"
"""The position before the first draft."""

_TTL = 60_000
"""Milliseconds after the last draft of an attempt: they go with the lease, and in any case."""

_MOST_BYTES = 1 << 20
"""Of the drafts of an attempt: ten times what a text of 1,024 tokens needs, one by one."""

_ENTRY_BYTES = 64
"""What Redis needs for a draft beside it: empty ones are not free."""

PAGE = 256
"""Drafts of a job that are read at a time: where it is full, there may be more."""


class Drafts:
    """Hints beside the results: nothing waits for them, and nothing is lost with them."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys)

    async def write(self, worker: str, drafts: Sequence[NewDraft]) -> int:
        """Keep drafts of jobs that the worker holds; return how many."""
        kept = await self._scripts(
            "draft",
            [],
            worker,
            _TTL,
            _MOST_BYTES,
            _ENTRY_BYTES,
            *(
                part
                for draft in drafts
                for part in (draft.lease.job_id, draft.lease.attempt, draft.data)
            ),
        )
        return int(kept)

    async def read(self, after: Mapping[str, str]) -> dict[str, list[StoredDraft]]:
        """Return drafts of some jobs, of the attempt that each is at.

        Parameters
        ----------
        after : mapping of str to str
            By job: the position of the last draft that was read, or `START`. It holds for what
            another attempt drafts as well.

        Returns
        -------
        dict of str to list of StoredDraft
            Of the jobs that have further ones.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            for job, position in after.items():
                pipe.xrange(self._keys.draft(job), f"({position}", "+", count=PAGE)
            rows: list[Any] = await pipe.execute()
        return {
            job: [StoredDraft(position.decode(), fields[b"d"]) for position, fields in row]
            for job, row in zip(after, rows, strict=True)
            if row
        }
