"""Drafts of texts that are being written: from workers to whoever reads along."""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.store.keys import Keys
from reltrace_scheduler.store.records import NewDraft
from reltrace_scheduler.store.scripts import Scripts

_TTL = 60_000
"""Milliseconds after the last draft of a job: far longer than a reader takes to look."""

_MOST = 4096
"""Drafts of a job, of all its attempts: a text has at most 1,024 tokens."""


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
            _MOST,
            *(
                part
                for draft in drafts
                for part in (draft.lease.job_id, draft.lease.attempt, draft.data)
            ),
        )
        return int(kept)

    async def read(self, after: Mapping[str, int]) -> dict[str, list[bytes]]:
        """Return the drafts of some jobs.

        Parameters
        ----------
        after : mapping of str to int
            By job: how many of its drafts were read.

        Returns
        -------
        dict of str to list of bytes
            Of the jobs that have further ones.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            for job, read in after.items():
                pipe.lrange(self._keys.draft(job), read, -1)
            rows: list[Any] = await pipe.execute()
        return {job: row for job, row in zip(after, rows, strict=True) if row}
