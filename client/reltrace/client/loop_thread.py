"""The event loop behind the synchronous clients."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent import futures
from typing import Any, Generic, Protocol, TypeVar

from reltrace.types.errors import TraceError

T = TypeVar("T")

_LOOK_FOR_SIGNALS = 0.2
"""Seconds. A signal that arrives just before a thread falls asleep on a lock does not wake it."""


_TIDY_UP = 2.0
"""Seconds that somebody who leaves is kept while the server is told."""


class Closing(Protocol):
    """What can be closed on the loop."""

    async def close(self) -> None:
        """Close it."""
        ...


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
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="reltrace-client", daemon=True
        )
        self._thread.start()
        self._ended = False
        self._closing: weakref.WeakSet[Closing] = weakref.WeakSet()
        self._finishing: set[asyncio.Task[None]] = set()
        atexit.register(self.end)

    def is_here(self) -> bool:
        """Tell whether the loop runs in this process, and not in the one it was forked from."""
        return self._pid == os.getpid()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it, from any other thread.

        An interruption of the waiting thread, such as Ctrl-C, cancels the coroutine, which has
        `_TIDY_UP` to leave in order; a second interruption ends that wait. It is noticed within
        `_LOOK_FOR_SIGNALS`, whichever thread the system gave the signal to.

        Raises
        ------
        TraceError
            In a forked child: the loop's thread is in its parent.
        """
        if not self.is_here():
            work.close()
            raise TraceError(
                "this client was made before the process was forked, and its connection is the "
                "parent's; make a new Client in each process"
            )
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a synchronous client can not be used on its own event loop")
        if self._ended:
            work.close()
            raise RuntimeError("the process is ending: a synchronous client can not be used now")
        call = _Call(work)
        future: futures.Future[T] | None = None
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
                    futures.wait((future,), _TIDY_UP)
            raise

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what ends something: from any thread, also as the process ends.

        A generator that nobody holds any more may be closed on the loop's own thread, which can
        not wait for itself, or after the loop has ended. In a forked child nothing is done: what
        there is to end is its parent's.
        """
        if self._ended or not self.is_here():
            work.close()
        elif threading.current_thread() is self._thread:
            task = self._loop.create_task(work)
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        else:
            self.run(work)

    def at_exit(self, closing: Closing) -> None:
        """Note a client to be closed when the process ends, if it still exists then."""
        self._closing.add(closing)

    def end(self) -> None:
        """Close what is open, for at most `_TIDY_UP`; nothing runs on the loop from then on."""
        if not self.is_here():
            return
        left = [client.close() for client in tuple(self._closing)]
        if left:
            future = asyncio.run_coroutine_threadsafe(_all(left), self._loop)
            futures.wait((future,), _TIDY_UP)
        self._ended = True


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*work, return_exceptions=True)


_lock = threading.Lock()
_shared: LoopThread | None = None


def shared() -> LoopThread:
    """Return the loop of this process; a forked child has its own."""
    global _shared
    with _lock:
        if _shared is None or not _shared.is_here():
            _shared = LoopThread()
        return _shared
