"""The jobs that ended last, kept for people to look at: a sample, bounded in number and bytes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reltrace_scheduler.keys import SharedKey
from reltrace_scheduler.per_second import PerSecond
from reltrace_scheduler.queue.shards import Shards
from reltrace_scheduler.queue.trouble import REDIS_ERRORS, log_trouble

_ROWS = 40
_ROWS_PER_SECOND = 5.0
_SAMPLES_PER_SECOND = 1.0
_SAMPLE_BYTES = 64 << 10
_SAMPLE_TTL = 300
"""Seconds: with the bounds above, at most 20 MB per scheduler."""


class RecentJobs:
    """Notes a few of the jobs that end, if a page shows them (`enabled`)."""

    def __init__(self, shards: Shards, *, enabled: bool) -> None:
        self._redis = shards.redis
        self._key = shards.all[0].key
        self.enabled = enabled
        # Apart, so that a thousand successes per second do not displace the failures.
        self._rates: dict[SharedKey, PerSecond] = {
            "recent_ok": PerSecond(_ROWS_PER_SECOND),
            "recent_failed": PerSecond(_ROWS_PER_SECOND),
        }
        self._samples = PerSecond(_SAMPLES_PER_SECOND)

    async def note(self, jobs: Sequence[tuple[Mapping[str, Any], bytes]]) -> None:
        """Note what is shown of jobs, and their serialized ``ResultChunk`` (empty: none).

        Each has "job" and "state" at least. Where they are too many, the last ones are noted. An
        error of Redis is only logged: nothing depends on these notes.
        """
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for key, rate in self._rates.items():
                    ok = key == "recent_ok"
                    new = [job for job in jobs if (job[0]["state"] == "SUCCEEDED") == ok]
                    if not (allowed := rate.take(len(new))):
                        continue
                    for job, chunk in new[-allowed:]:
                        sampled = 0 < len(chunk) <= _SAMPLE_BYTES and self._samples.take(1) == 1
                        if sampled:
                            name = self._key("sample_result", job["job"])
                            pipe.set(name, chunk, ex=_SAMPLE_TTL)
                        pipe.lpush(self._key(key), json.dumps({**job, "sampled": sampled}))
                    pipe.ltrim(self._key(key), 0, _ROWS - 1)
                await pipe.execute()
        except REDIS_ERRORS as error:
            log_trouble("recent.lost", error)

    async def rows(self, *, ok: bool) -> list[dict[str, Any]]:
        """Return the jobs that succeeded last, or those that ended otherwise, the latest first.

        "sampled" says that `sample_result` may have the result.
        """
        key = self._key("recent_ok" if ok else "recent_failed")
        found: Any = await self._redis.lrange(key, 0, _ROWS - 1)
        return [json.loads(row) for row in found]

    async def sample_result(self, job_id: str) -> bytes | None:
        found: Any = await self._redis.get(self._key("sample_result", job_id))
        return found if found is None else bytes(found)
