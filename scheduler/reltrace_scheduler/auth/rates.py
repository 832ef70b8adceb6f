"""Limits of what one identity may do: rates, and streams that are open at a time."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from weakref import WeakValueDictionary

from redis.asyncio import Redis

from reltrace_scheduler.errors import TooFastError, TooManyStreamsError
from reltrace_scheduler.keys import rate_key

_BURST = 2.0
"""Seconds of a rate that may be used up at once."""

_PACE = 2000.0
"""Calls per second of one token at one scheduler: about as many as it can serve."""

_LONGEST_WAIT = 2.0
"""Seconds; so many calls of one token wait at most, times the pace."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one identity may do per second; None: no limit."""

    requests: float | None = None
    """Calls, of any method; a stream counts once."""
    jobs: float | None = None
    """Jobs in submissions."""


class RateLimiter:
    """Token buckets in Redis, which all schedulers share."""

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


class Pacer:
    """Makes the calls of an identity wait that come faster than one scheduler serves them.

    Calls of others, heartbeats among them, are then not behind all of these. Who waits holds a
    call, so that a caller in a loop is slowed down; a refusal would only make it call again.
    """

    def __init__(self) -> None:
        # By identity: when its next call is due if calls come at an even pace.
        self._due: dict[str, float] = {}

    async def wait(self, identity: str) -> None:
        """Wait for an identity's turn. Raises TooFastError where too many of its calls wait."""
        now = time.monotonic()
        due = max(self._due.get(identity, 0.0), now - _BURST)
        if due - now > _LONGEST_WAIT:
            raise TooFastError(f"{identity!r} makes too many calls at a time", _LONGEST_WAIT)
        self._due[identity] = due + 1 / _PACE
        if due > now:
            await asyncio.sleep(due - now)


class OpenStreams:
    """Counts the streams that each identity has open, and bounds them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_of(self, identity: str) -> Iterator[None]:
        """Count a stream while the block runs. Raises TooManyStreamsError."""
        if self._open[identity] >= self._most:
            raise TooManyStreamsError(identity, self._most)
        self._open[identity] += 1
        try:
            yield
        finally:
            self._open[identity] -= 1
            if not self._open[identity]:
                del self._open[identity]


class Turns:
    """Lets so many calls go on at a time, and of one identity fewer; the others wait in order."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._most_of_one = most_of_one
        # Only those of identities that have calls.
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def one_of(self, identity: str) -> AsyncIterator[None]:
        """Wait for the turn of a call, and keep it while the block runs."""
        own = self._own.get(identity)
        if own is None:
            own = self._own[identity] = asyncio.Semaphore(self._most_of_one)
        async with own, self._all:
            yield
