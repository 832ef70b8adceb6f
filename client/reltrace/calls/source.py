"""Sources of the items of `trace_many`: lists, iterators that may block, async iterators."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

from reltrace.types.errors import invalid

# Seconds that a partial submission waits for the next item of a source.
_LINGER = 0.002


def open_source(items: object, argument: str = "items") -> Source:
    """Return the source for an argument; raise InvalidArgument if it is not one of items."""
    check_iterable(items, argument, Iterable | AsyncIterable)
    if isinstance(items, list | tuple):
        return _Ready(items)
    if isinstance(items, AsyncIterable):
        return _Async(items)
    assert isinstance(items, Iterable)
    return _Blocking(items)


def check_iterable(items: object, argument: str, kinds: UnionType | type = Iterable) -> None:
    """Raise InvalidArgument if `items` is a single item, or not of these kinds."""
    kind = type(items).__name__
    if isinstance(items, str | bytes | Mapping):
        raise invalid(argument, f"must be an iterable of {argument}, not one {kind}")
    if not isinstance(items, kinds):
        raise invalid(argument, f"must be an iterable of {argument}, not {kind}")


class Source:
    """Items that a task or a thread pulls, no more of them than `take` asks for."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._ended = False
        self._closed = False
        # How many more items may be pulled, and whether one is being pulled now.
        self._allowed = 0
        self._pulling = False

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        """Return up to `limit` items; None at the end.

        With `wait` false, an empty list means that the source would block. An exception of the
        source is raised after its items have been returned.
        """
        self._allow(limit)
        # Cleared before the items are checked: one that arrives after the check sets it again.
        self._arrived.clear()
        if not self._items and not self._ended:
            try:
                # Not wait_for: in Python 3.11 it loses a cancellation that comes with an item.
                async with asyncio.timeout(None if wait else _LINGER):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        taken = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
        if taken or not self._ended:
            return taken
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    async def close(self) -> None:
        """Stop pulling."""
        self._closed = True

    def _allow(self, limit: int) -> None:
        """Allow items to be pulled until there are `limit`."""
        self._allowed = max(0, limit - len(self._items) - self._pulling)

    def _failed(self, cause: BaseException) -> None:
        """Keep the error of the source; SystemExit and the like must not look like its end."""
        if not isinstance(cause, Exception):
            error = RuntimeError(f"the items ended with {cause!r}")
            error.__cause__ = cause
            cause = error
        self._error = cause


class _Ready(Source):
    """A list or tuple, which never blocks."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__()
        self._all = items
        self._next = 0

    async def take(self, limit: int, wait: bool) -> list[Any] | None:
        taken = list(self._all[self._next : self._next + limit])
        self._next += len(taken)
        return taken or None


class _Async(Source):
    """An async iterable, pulled by a task."""

    def __init__(self, items: AsyncIterable[Any]) -> None:
        super().__init__()
        self._iterator = aiter(items)
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _allow(self, limit: int) -> None:
        super()._allow(limit)
        self._more.set()
        if self._task is None:
            self._task = asyncio.create_task(self._pull())

    async def _pull(self) -> None:
        try:
            while True:
                while self._allowed <= 0:
                    self._more.clear()
                    await self._more.wait()
                self._allowed -= 1
                self._pulling = True
                self._items.append(await anext(self._iterator))
                self._pulling = False
                self._arrived.set()
        except StopAsyncIteration:
            pass
        except asyncio.CancelledError as error:
            if self._closed:
                raise
            # Not by `close`: something that the source waited for was cancelled.
            self._failed(error)
        except Exception as error:
            self._failed(error)
        finally:
            self._ended = True
            self._arrived.set()

    async def close(self) -> None:
        await super().close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class _Blocking(Source):
    """Any other iterable, pulled in a thread of its own, since `next` may block."""

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__()
        self._iterator = iter(items)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def _allow(self, limit: int) -> None:
        if self._thread is None:
            # A daemon, since a `next` that blocks, such as on a terminal, can not be interrupted.
            self._thread = threading.Thread(
                target=self._pull,
                args=(asyncio.get_running_loop(),),
                name="reltrace-source",
                daemon=True,
            )
            self._thread.start()
        with self._changed:
            super()._allow(limit)
            self._changed.notify()

    def _pull(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._may_pull():
                try:
                    item = next(self._iterator)
                except StopIteration:
                    return
                # Both at once: in between, `_allow` would count the item twice or not at all.
                with self._changed:
                    self._items.append(item)
                    self._pulling = False
                if not self._arrived.is_set():
                    self._wake(loop)
        except BaseException as error:
            self._failed(error)
        finally:
            self._ended = True
            self._wake(loop)

    def _may_pull(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._allowed > 0 or self._closed)
            self._allowed -= 1
            self._pulling = True
            return not self._closed

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._closed and not loop.is_closed():
            loop.call_soon_threadsafe(self._arrived.set)

    async def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
