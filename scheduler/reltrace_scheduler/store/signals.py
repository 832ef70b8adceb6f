"""Wake-ups through Redis publish/subscribe: hints that save polling."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from reltrace_scheduler.store.keys import Keys

log = structlog.get_logger()

_RETRY = 0.2
"""Seconds before connecting again."""


class Signals:
    """One subscription for the whole process, spread to whoever listens.

    A message may be missed (while Redis is away, say): listeners look for themselves
    from time to time, and on every connection all of them are woken.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._listeners: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def listen(self, channel: str) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever the channel is signalled."""
        event = asyncio.Event()
        self._listeners[channel].add(event)
        try:
            yield event
        finally:
            self._listeners[channel].discard(event)
            if not self._listeners[channel]:
                del self._listeners[channel]

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
            await pubsub.psubscribe(*self._keys.channels)
            for events in list(self._listeners.values()):
                _set_all(events)
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=10.0)
                if message is not None:
                    _set_all(self._listeners.get(message["channel"].decode(), set()))


def _set_all(events: set[asyncio.Event]) -> None:
    for event in events:
        event.set()


async def wait(event: asyncio.Event, timeout: float) -> bool:
    """Wait for a signal, but at most `timeout` seconds; clear it, and return whether it came."""
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
