"""Wake-ups through Redis publish/subscribe: hints that save polling."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from redis.exceptions import RedisError

from reltrace_scheduler.keys import CHANNELS
from reltrace_scheduler.queue.trouble import log_trouble

_RETRY = 0.2
"""Seconds before connecting again."""


class Listener(asyncio.Event):
    """Set when one of its channels is signalled."""

    async def wait_and_clear(self, timeout: float) -> bool:
        """Wait for a signal, but at most `timeout` seconds; return whether one came."""
        try:
            async with asyncio.timeout(timeout):
                await self.wait()
        except TimeoutError:
            return False
        self.clear()
        return True


class Signals:
    """One subscription for the whole process, spread to its listeners.

    A message may be missed (while Redis is away, say): listeners poll from time to time, and
    with every new connection all of them are signalled.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._listeners: defaultdict[str, set[Listener]] = defaultdict(set)
        self._counts: Counter[str] = Counter()
        self._connections = 0

    def count(self, channel: str) -> tuple[int, int]:
        """Return the number of connections, and of signals on a channel that has listeners.

        Signals before a connection may have been missed.
        """
        return self._connections, self._counts[channel]

    @contextmanager
    def listen(self, *channels: str) -> Iterator[Listener]:
        """Give a listener that is signalled whenever one of the channels is."""
        listener = Listener()
        for channel in channels:
            self._listeners[channel].add(listener)
        try:
            yield listener
        finally:
            for channel in channels:
                self._listeners[channel].discard(listener)
                if not self._listeners[channel]:
                    del self._listeners[channel]
                    del self._counts[channel]

    async def run(self) -> None:
        while True:
            try:
                await self._receive()
            except (RedisError, OSError) as error:
                log_trouble("signals.lost", error)
                await asyncio.sleep(_RETRY)

    async def _receive(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.psubscribe(*CHANNELS)
            self._connections += 1
            for listener in set().union(*self._listeners.values()):
                listener.set()
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=10.0)
                channel = message["channel"].decode() if message else ""
                if channel in self._listeners:
                    self._counts[channel] += 1
                    for listener in self._listeners[channel]:
                        listener.set()
