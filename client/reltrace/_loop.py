"""The event loop behind the synchronous clients."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_GIVE_UP = 2.0
"""Seconds in which work that is interrupted may end in order."""

_LOOK_FOR_SIGNALS = 0.2
"""Seconds. A signal that arrives just before a thread falls asleep on a lock does not wake it."""


class _Call(Generic[T]):
    """A coroutine that can be cancelled whether it has begun or not.

    An interruption may come before there is a future that could be cancelled.
    """

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def run(self) -> T:
        if self._cancelled:
            self._work.close()
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        return await self._work

    def cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()


class LoopThread:
    """An event loop in a daemon thread, which all synchronous clients of a process share."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="reltrace-client", daemon=True
        )
        self._finishing: set[asyncio.Task[None]] = set()
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it, from any other thread.

        An interruption of the waiting thread, such as Ctrl-C, cancels the coroutine, and is raised
        once that has ended, which takes `_GIVE_UP` at most. It is noticed within
        `_LOOK_FOR_SIGNALS`, whichever thread the system gave the signal to.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a synchronous client can not be used on its own event loop")
        call = _Call(work)
        future: Future[T] | None = None
        try:
            future = asyncio.run_coroutine_threadsafe(call.run(), self._loop)
            while True:
                try:
                    return future.result(_LOOK_FOR_SIGNALS)
                except TimeoutError:
                    # Ours, or the coroutine's own: that one is raised again.
                    if future.done():
                        return future.result()
        except BaseException:
            if future is None or not future.done():
                self._loop.call_soon_threadsafe(call.cancel)
            if future is not None:
                wait([future], _GIVE_UP)
            raise

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that ends something, and wait for it if this thread can.

        An iterator that nobody uses any more is closed by whichever thread collects garbage, and
        that may be the loop's own.
        """
        if threading.current_thread() is self._thread:
            task = self._loop.create_task(work)
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        else:
            self.run(work)


_lock = threading.Lock()
_shared: LoopThread | None = None


def shared() -> LoopThread:
    """Return the loop of this process; a forked child has its own."""
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():
            _shared = LoopThread()
        return _shared
