"""Wake-ups through Redis publish/subscribe: hints that save polling."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from reltrace_scheduler.keys import NO_CHANNEL
from reltrace_scheduler.queue.trouble import REDIS_ERRORS, log_trouble
from reltrace_scheduler.tasks import end

_RETRY = 0.2
"""Seconds before connecting again."""

_CONFIRMED = 0.5
"""Seconds that a listener waits for its subscription."""

_IDLE = 5.0
"""Seconds without a message after which the server is asked for one, or given up."""


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
    """One connection for the whole process, subscribed to what its listeners listen to.

    A message may be missed (while Redis is away, say): listeners poll from time to time, and
    with every new connection all of them are signalled.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._listeners: dict[str, set[Listener]] = {}
        self._counts: dict[str, int] = {}
        self._count = 0
        self._connected = False
        # Channels whose subscription is to be made or ended, and those where Redis has made it.
        self._changed: set[str] = set()
        self._change = asyncio.Event()
        self._confirmed: set[str] = set()
        self._confirmations: dict[str, asyncio.Event] = {}

    def count(self, channel: str) -> int:
        """Return a number that is another one after each signal on a channel with listeners.

        Also after each subscription to it: signals before that were missed.
        """
        return self._counts.get(channel, 0)

    @asynccontextmanager
    async def listen(self, *channels: str) -> AsyncIterator[Listener]:
        """Give a listener that is signalled whenever one of the channels is.

        What is read from the store after that is no older than the subscription.
        """
        listener = Listener()
        for channel in channels:
            if channel not in self._listeners:
                self._listeners[channel] = set()
                self._note_change(channel)
            self._listeners[channel].add(listener)
        try:
            if self._connected and await self._confirm(channels):
                # What this would tell is read after it.
                listener.clear()
            yield listener
        finally:
            for channel in channels:
                self._listeners[channel].discard(listener)
                if not self._listeners[channel]:
                    del self._listeners[channel]
                    self._counts.pop(channel, None)
                    self._note_change(channel)

    async def run(self) -> None:
        while True:
            try:
                await self._connect()
            except REDIS_ERRORS as error:
                log_trouble("signals.lost", error)
                await asyncio.sleep(_RETRY)

    def _note_change(self, channel: str) -> None:
        self._changed.add(channel)
        self._change.set()

    async def _confirm(self, channels: Iterable[str]) -> bool:
        """Wait until Redis has subscribed the connection to channels."""
        try:
            async with asyncio.timeout(_CONFIRMED):
                for channel in channels:
                    if channel not in self._confirmed:
                        event = self._confirmations.setdefault(channel, asyncio.Event())
                        await event.wait()
        except TimeoutError:
            return False
        return self._connected

    async def _connect(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(NO_CHANNEL)
            # Used itself from here on: `pubsub` would connect again without a word, and what was
            # published meanwhile would be missed. Only this task and the other one use it, so that
            # a listener that is cancelled does not break it.
            connection: AbstractConnection = pubsub.connection
            self._changed = set(self._listeners)
            self._change.set()
            self._connected = True
            sending = asyncio.create_task(self._send_changes(connection))
            try:
                await self._receive(connection)
            finally:
                self._connected = False
                await end([sending])
                self._confirmed.clear()
                for event in self._confirmations.values():
                    event.set()
                self._confirmations.clear()

    async def _send_changes(self, connection: AbstractConnection) -> None:
        subscribed: set[str] = set()
        while True:
            await self._change.wait()
            self._change.clear()
            changed, self._changed = self._changed, set()
            wanted = {channel for channel in changed if channel in self._listeners}
            new, gone = wanted - subscribed, (changed - wanted) & subscribed
            subscribed |= new
            subscribed -= gone
            try:
                for command, channels in (("SUBSCRIBE", new), ("UNSUBSCRIBE", gone)):
                    if channels:
                        await connection.send_command(command, *channels, check_health=False)
            except REDIS_ERRORS:
                # It is closed now, which the other task learns too.
                return

    async def _receive(self, connection: AbstractConnection) -> None:
        asked = False
        while True:
            reply = await connection.read_response(
                timeout=_IDLE, disconnect_on_error=False, push_request=True
            )
            if connection.should_reconnect():  # type: ignore[no-untyped-call]
                raise RedisConnectionError("the server is not the primary any more")
            if reply is None:
                if asked:
                    raise RedisConnectionError("the server is silent")
                await connection.send_command("PING", check_health=False)
            asked = reply is None
            if reply is not None:
                self._take(reply[0], reply[1].decode())

    def _take(self, kind: bytes, channel: str) -> None:
        if kind == b"unsubscribe":
            self._confirmed.discard(channel)
        if kind == b"subscribe":
            self._confirmed.add(channel)
            if confirmation := self._confirmations.pop(channel, None):
                confirmation.set()
        if kind in (b"message", b"subscribe") and channel in self._listeners:
            self._count += 1
            self._counts[channel] = self._count
            for listener in self._listeners[channel]:
                listener.set()
