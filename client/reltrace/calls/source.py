"""Where the items of `trace_many` come from: lists, iterators that may block, async iterators."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Protocol

from reltrace.types.errors import invalid

# How long a partial submission waits for a source that is about to give more.
_LINGER = 0.002


class Source(Protocol):
    """Items, pulled no further ahead than asked for."""

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        """Return up to `limit` items; None: there are no more.

        With `wait` false, an empty list means that the source would block.
        An exception that the source raises comes out here, after its items.
        """
        ...

    async def close(self) -> None:
        """Stop pulling."""
        ...


def open_source(items: object, argument: str = "items") -> Source:
    """Return the source for what was passed as `items`, or as another argument.

    Raises
    ------
    InvalidArgument
        If it is no iterable of items.
    """
    check_iterable(items, argument, Iterable | AsyncIterable)
    if isinstance(items, list | tuple):
        return _Ready(items)
    if isinstance(items, AsyncIterable):
        return _Async(items)
    assert isinstance(items, Iterable)
    return _Blocking(items)


def check_iterable(items: object, argument: str, kinds: UnionType | type = Iterable) -> None:
    """Raise InvalidArgument if it is none of such a kind, or a single item."""
    kind = type(items).__name__
    if isinstance(items, str | bytes | Mapping):
        raise invalid(argument, f"must be an iterable of {argument}, not one {kind}")
    if not isinstance(items, kinds):
        raise invalid(argument, f"must be an iterable of {argument}, not {kind}")


class _Ready:
    """A list or tuple: never blocks."""

    def __init__(self, items: list[Any] | tuple[Any, ...]) -> None:
        self._items = items
        self._next = 0

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        taken = list(self._items[self._next : self._next + limit])
        self._next += len(taken)
        return taken or None

    async def close(self) -> None:
        pass


class _Buffer:
    """Items between whoever pulls the source and whoever takes them; at most `allowed`."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self.ended = False
        self.error: Exception | None = None
        self.arrived = asyncio.Event()

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        # Cleared before the look at `items`: what arrives after the look sets it again.
        self.arrived.clear()
        if not self.items and not self.ended:
            try:
                # Not wait_for: that of Python 3.11 loses a cancellation that comes with an item.
                async with asyncio.timeout(None if wait else _LINGER):
                    await self.arrived.wait()
            except TimeoutError:
                return []
        taken = [self.items.popleft() for _ in range(min(limit, len(self.items)))]
        if taken or not self.ended:
            return taken
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return None


def _broken_off(cause: BaseException) -> RuntimeError:
    """Return what a caller is told where a source ended by what is no error of its own."""
    error = RuntimeError(f"the items ended with {cause!r}")
    error.__cause__ = cause
    return error


class _Async:
    """An async iterable, pulled by a task."""

    def __init__(self, items: AsyncIterable[Any]) -> None:
        self._iterator: AsyncIterator[Any] = aiter(items)
        self._buffer = _Buffer()
        self._allowed = 0
        self._pulling = 0
        self._closed = False
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        self._allowed = max(0, limit - len(self._buffer.items) - self._pulling)
        self._more.set()
        if self._task is None:
            self._task = asyncio.create_task(self._pull())
        return await self._buffer.take(limit, wait)

    async def _pull(self) -> None:
        buffer = self._buffer
        try:
            while True:
                while self._allowed <= 0:
                    self._more.clear()
                    await self._more.wait()
                self._allowed -= 1
                self._pulling = 1
                try:
                    item = await anext(self._iterator)
                except StopAsyncIteration:
                    return
                buffer.items.append(item)
                self._pulling = 0
                buffer.arrived.set()
        except asyncio.CancelledError as error:
            if self._closed:
                raise
            # What the source waited for was cancelled: that must not pass as the end of the items.
            buffer.error = _broken_off(error)
        except Exception as error:
            buffer.error = error
        finally:
            buffer.ended = True
            buffer.arrived.set()

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class _Blocking:
    """Any other iterable, pulled in a thread of its own: `next` may block as long as it likes."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._iterator: Iterator[Any] = iter(items)
        self._buffer = _Buffer()
        self._allowed = 0
        self._pulling = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        if self._thread is None:
            loop = asyncio.get_running_loop()
            # A daemon: nothing can end a `next` that blocks for ever, such as on a terminal.
            self._thread = threading.Thread(
                target=self._pull, args=(loop,), name="reltrace-source", daemon=True
            )
            self._thread.start()
        with self._changed:
            self._allowed = max(0, limit - len(self._buffer.items) - self._pulling)
            self._changed.notify()
        return await self._buffer.take(limit, wait)

    def _pull(self, loop: asyncio.AbstractEventLoop) -> None:
        buffer = self._buffer
        try:
            while self._may_pull():
                try:
                    item = next(self._iterator)
                except StopIteration:
                    return
                # Together: between the two, `take` would count the item twice or not at all.
                with self._changed:
                    buffer.items.append(item)
                    self._pulling = 0
                if not buffer.arrived.is_set():
                    self._wake(loop)
        except Exception as error:
            buffer.error = error
        except BaseException as error:
            # SystemExit and the like must not pass as the end of the items.
            buffer.error = _broken_off(error)
        finally:
            buffer.ended = True
            self._wake(loop)

    def _may_pull(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._allowed > 0 or self._closed)
            self._allowed -= 1
            self._pulling = 1
            return not self._closed

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._closed and not loop.is_closed():
            loop.call_soon_threadsafe(self._buffer.arrived.set)

    async def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
