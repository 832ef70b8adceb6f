"""Work in threads that is never left half done: who is cancelled waits for its end first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def to_the_end(function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
    """Call a function in a thread and return what it returns, or raise what it raises.

    A thread can not be stopped. Whoever is cancelled meanwhile is so once the thread has ended, and
    until then nobody goes on as if it had.
    """
    work = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    await settled([work])
    return work.result()


async def settled(work: Iterable[asyncio.Future[Any]]) -> None:
    """Wait until all of it has ended, however; a cancellation meanwhile is raised only then."""
    pending, cancelled = set(work), None
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
            pending = {one for one in pending if not one.done()}
    if cancelled is not None:
        raise cancelled
