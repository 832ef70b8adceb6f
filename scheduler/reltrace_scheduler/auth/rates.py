"""Limits of calls and jobs per second: token buckets in Redis, which all schedulers share."""

from dataclasses import dataclass
from importlib.resources import files

from redis.asyncio import Redis

from reltrace_scheduler.errors import TooFastError
from reltrace_scheduler.keys import rate_key

_BURST = 2.0
"""Seconds of a rate that may be used up at once."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one identity may do per second; None: no limit."""

    requests: float | None = None
    """Calls, of any method; a stream counts once."""
    jobs: float | None = None
    """Jobs in submissions."""


class RateLimiter:
    def __init__(self, redis: Redis, rates: Rates) -> None:
        self._rates = {"requests": rates.requests, "jobs": rates.jobs}
        self._script = redis.register_script((files(__package__) / "rate.lua").read_text())

    async def take(self, identity: str, what: str, units: int) -> None:
        """Take "requests" or "jobs" out of an identity's bucket, or raise TooFastError.

        More units than a bucket holds are taken once it is full, and later calls wait until it
        has been refilled: a message of many jobs is accepted.
        """
        rate = self._rates[what]
        if rate is None:
            return
        capacity = max(1.0, rate * _BURST)
        key = rate_key(what, identity)
        wait = float(await self._script(keys=[key], args=[rate, capacity, units]))
        if wait > 0:
            message = f"{identity!r} sends {what} faster than this service allows"
            raise TooFastError(f"{message}: try again in {wait:.2f} s", wait)
