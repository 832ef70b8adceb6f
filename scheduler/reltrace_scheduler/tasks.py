"""Keeps the event loop free, and ends tasks in the background."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_LARGE = 1 << 16
"""Bytes of a message on which work may take longer than 10 ms."""

_is_large: ContextVar[bool] = ContextVar("is_large", default=False)

# One for all: several would leave the event loop a smaller share of the interpreter.
_thread = ThreadPoolExecutor(1, "messages")

_REPEAT = 0.2
"""Seconds between cancellations."""


async def end(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until they are over.

    Cancelling once is not enough: redis-py swallows a cancellation that comes while it
    connects, and the task would then go on for ever.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_REPEAT)


def note_size(size: int) -> None:
    """Note how many bytes the message of this call has: a parsed one can not be asked cheaply."""
    _is_large.set(size > _LARGE)


async def off_loop(work: Callable[[], T]) -> T:
    """Do work on the message of this call: on a thread, if it is so large that others wait."""
    if not _is_large.get():
        return work()
    return await asyncio.get_running_loop().run_in_executor(_thread, work)
