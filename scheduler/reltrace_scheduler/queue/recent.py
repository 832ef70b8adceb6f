"""The jobs that ended last, kept for people to look at: a sample, bounded in number and bytes."""

import json
import time
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from reltrace_scheduler.keys import Keys

log = structlog.get_logger()

_ROWS = 40
_ROWS_PER_SECOND = 5.0
_PICTURES_PER_SECOND = 1.0
_PICTURE_BYTES = 64 << 10
_PICTURE_TTL = 300
"""Seconds: with the bounds above, at most 20 MB per scheduler."""


@dataclass(frozen=True, slots=True)
class RecentJob:
    """A job that ended.

    Attributes
    ----------
    job, tenant, model, worker : str
        The job, whose it was, what it asked for, and who ran it last.
    state : str
        In which it ended.
    at : float
        Unix time.
    text : str
        The beginning of its prompt.
    error : str
        Why it did not succeed.
    picture : bytes
        Its serialized ``ResultChunk``; empty: there is none to show.
    """

    job: str
    tenant: str
    model: str
    worker: str
    state: str
    at: float
    text: str = ""
    error: str = ""
    picture: bytes = b""


class Recent:
    """Notes jobs that end, as many as people can look at.

    Parameters
    ----------
    enabled : bool
        Somebody looks; else nothing is noted.
    """

    def __init__(self, redis: Redis, keys: Keys, *, enabled: bool) -> None:
        self._redis = redis
        self._keys = keys
        self.enabled = enabled
        self._rows = _Allowance(_ROWS_PER_SECOND)
        self._bad_rows = _Allowance(_ROWS_PER_SECOND)
        self._pictures = _Allowance(_PICTURES_PER_SECOND)

    async def note(self, jobs: Sequence[RecentJob]) -> None:
        """Note jobs, or of too many the last ones. It may fail: nothing depends on it."""
        if not self.enabled or not jobs:
            return
        # Apart: what goes well, a thousand times a second, must not push out what went wrong.
        well = [job for job in jobs if job.state == "SUCCEEDED"]
        badly = [job for job in jobs if job.state != "SUCCEEDED"]
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                self._push(pipe, self._keys.recent, well, self._rows)
                self._push(pipe, self._keys.mishaps, badly, self._bad_rows)
                await pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("recent.lost", error=str(error))

    def _push(self, pipe: Any, key: str, jobs: list[RecentJob], allowance: "_Allowance") -> None:
        room = allowance.take(len(jobs))
        if not room:
            return
        for job in jobs[-room:]:
            row = asdict(job)
            shown = 0 < len(job.picture) <= _PICTURE_BYTES and self._pictures.take(1) == 1
            row["picture"] = shown
            if shown:
                pipe.set(self._keys.picture(job.job), job.picture, ex=_PICTURE_TTL)
            pipe.lpush(key, json.dumps(row))
        pipe.ltrim(key, 0, _ROWS - 1)

    async def rows(self) -> list[dict[str, Any]]:
        """Return the jobs that ended well last, the latest first, as JSON holds them."""
        return await self._read(self._keys.recent)

    async def mishaps(self) -> list[dict[str, Any]]:
        """Return those that ended otherwise."""
        return await self._read(self._keys.mishaps)

    async def _read(self, key: str) -> list[dict[str, Any]]:
        found: Any = await cast("Awaitable[Any]", self._redis.lrange(key, 0, _ROWS - 1))
        return [json.loads(row) for row in found]

    async def picture(self, job_id: str) -> bytes | None:
        """Return the serialized ``ResultChunk`` of a job, if it was kept."""
        found: Any = await self._redis.get(self._keys.picture(job_id))
        return found if found is None else bytes(found)


class _Allowance:
    """So many per second; a second's worth may come at once."""

    def __init__(self, per_second: float) -> None:
        self._rate = per_second
        self._left = per_second
        self._at = time.monotonic()

    def take(self, wanted: int) -> int:
        """Return how many of those wanted are allowed now."""
        now = time.monotonic()
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        taken = min(wanted, int(self._left))
        self._left -= taken
        return taken
