"""The event loop behind the synchronous clients."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Coroutine, Generator
from concurrent import futures
from typing import Any, Generic, TypeVar

from reltrace.calls.iteration import Run
from reltrace.calls.progress import Progress
from reltrace.transport import forking
from reltrace.transport.connection import Connection
from reltrace.types.errors import TraceError

T = TypeVar("T")

# Seconds. A signal that arrives just before a thread waits on a lock does not end the wait.
_SIGNAL_CHECK_INTERVAL = 0.2
# Seconds that an interrupted caller, and the end of the process, wait until jobs are cancelled.
_CLEANUP_TIMEOUT = 2.0


class _Call(Generic[T]):
    """A coroutine that can be cancelled before it has begun, when it has no task yet."""

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
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._finishing: set[asyncio.Task[None]] = set()
        atexit.register(self.end)

    def is_here(self) -> bool:
        """Tell whether the loop runs in this process, which may have been forked since."""
        return self._pid == os.getpid()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it, from any other thread.

        An interruption of the waiting thread, such as Ctrl-C, cancels the coroutine and waits
        `_CLEANUP_TIMEOUT` for its end; a second interruption ends that wait. It is noticed within
        `_SIGNAL_CHECK_INTERVAL`, whichever thread received the signal.

        Raises
        ------
        TraceError
            In a forked child: the loop's thread is in its parent.
        """
        unusable: Exception | None = None
        if not self.is_here():
            unusable = TraceError(
                f"this client was made before the process was forked; {forking.advice()}"
            )
        elif threading.current_thread() is self._thread:
            unusable = RuntimeError("a synchronous client can not be used on its own event loop")
        elif self._ended:
            unusable = RuntimeError("the process is ending: a client can not be used any more")
        if unusable is not None:
            work.close()
            raise unusable
        call = _Call(work)
        future: futures.Future[T] | None = None
        try:
            future = asyncio.run_coroutine_threadsafe(call.run(), self._loop)
            while True:
                try:
                    return future.result(_SIGNAL_CHECK_INTERVAL)
                except TimeoutError:
                    # Of this wait, or raised by the coroutine, whose result raises it again.
                    if future.done():
                        return future.result()
        except BaseException:
            if future is None or not future.done():
                self._loop.call_soon_threadsafe(call.cancel)
                if future is not None:
                    futures.wait((future,), _CLEANUP_TIMEOUT)
            raise

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that closes something, from any thread, also while the process ends.

        A generator that is no longer referred to may be closed on the loop's own thread, which
        can not wait for itself, or after the loop has ended. In a forked child nothing is done,
        since the connection belongs to the parent.
        """
        if self._ended or not self.is_here():
            work.close()
        elif threading.current_thread() is self._thread:
            task = self._loop.create_task(work)
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        else:
            self.run(work)

    def iterate(self, run: Run[T], progress: Progress) -> Generator[T, None, None]:
        """Yield the results of a run, one by one."""
        try:
            with progress:
                while results := self.run(run.take()):
                    for result in results:
                        progress.count(result)
                        yield result
        finally:
            self.finish(run.close())

    def close_at_exit(self, connection: Connection) -> None:
        """Close a connection when the process ends, if it still exists then."""
        self._connections.add(connection)

    def end(self) -> None:
        """Close all connections within `_CLEANUP_TIMEOUT`; the loop runs nothing after that."""
        if not self.is_here():
            return
        if connections := tuple(self._connections):
            closing = asyncio.run_coroutine_threadsafe(_close(connections), self._loop)
            futures.wait((closing,), _CLEANUP_TIMEOUT)
        self._ended = True


async def _close(connections: tuple[Connection, ...]) -> None:
    await asyncio.gather(*(one.close() for one in connections), return_exceptions=True)


_lock = threading.Lock()
_shared: LoopThread | None = None


def shared() -> LoopThread:
    """Return the loop of this process; a forked child has its own."""
    global _shared
    with _lock:
        if _shared is None or not _shared.is_here():
            _shared = LoopThread()
        return _shared
