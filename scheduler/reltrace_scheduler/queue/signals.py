"""Wake-ups through Redis publish/subscribe: hints that save polling."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from reltrace_scheduler.keys import CHANNELS

log = structlog.get_logger()

_RETRY = 0.2
"""Seconds before connecting again."""


class Listener:
    """What one listener has heard since it last took it.

    Attributes
    ----------
    event : asyncio.Event
        Set when there is something.
    """

    def __init__(self, channels: Collection[str]) -> None:
        self.channels = frozenset(channels)
        self.event = asyncio.Event()
        self._heard: set[str] = set()

    def hear(self, channel: str | None = None) -> None:
        """Note a signal; None: there may have been one on any channel."""
        self._heard |= self.channels if channel is None else {channel}
        self.event.set()

    def take(self) -> set[str]:
        """Return the channels that were signalled, and forget them."""
        heard, self._heard = self._heard, set()
        return heard


class Signals:
    """One subscription for the whole process, spread to whoever listens.

    A message may be missed (while Redis is away, say): listeners look for themselves
    from time to time, and on every connection all of them are woken.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._listeners: defaultdict[str, set[Listener]] = defaultdict(set)
        self._counts: Counter[str] = Counter()
        self._connections = 0

    def count(self, channel: str) -> tuple[int, int]:
        """Return what changes with every signal on a channel that somebody listens to.

        And with every connection: what was signalled before it, nobody knows.
        """
        return self._connections, self._counts[channel]

    @contextmanager
    def listen(self, *channels: str) -> Iterator[Listener]:
        """Give a listener that hears whenever one of the channels is signalled."""
        listener = Listener(channels)
        for channel in listener.channels:
            self._listeners[channel].add(listener)
        try:
            yield listener
        finally:
            for channel in listener.channels:
                self._listeners[channel].discard(listener)
                if not self._listeners[channel]:
                    del self._listeners[channel]
                    del self._counts[channel]

    async def run(self) -> None:
        """Receive until cancelled."""
        while True:
            try:
                await self._receive()
            except (RedisError, OSError) as error:
                log.warning("signals.lost", error=str(error))
                await asyncio.sleep(_RETRY)

    async def _receive(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.psubscribe(*CHANNELS)
            self._connections += 1
            for listener in set().union(*self._listeners.values()):
                listener.hear()
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=10.0)
                if message is not None:
                    channel = message["channel"].decode()
                    if channel in self._listeners:
                        self._counts[channel] += 1
                    for listener in self._listeners.get(channel, set()):
                        listener.hear(channel)


async def wait(listener: Listener, timeout: float) -> bool:
    """Wait for a signal, but at most `timeout` seconds; return whether one came."""
    try:
        async with asyncio.timeout(timeout):
            await listener.event.wait()
    except TimeoutError:
        return False
    listener.event.clear()
    return True
