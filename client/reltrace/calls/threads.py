"""Threads whose end a cancelled caller waits for, so that their work is not left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def shielded_to_thread(function: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
    """Call a function in a thread. A caller that is cancelled waits for the thread's end first."""
    work = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    await gather_shielded([work])
    return work.result()


async def gather_shielded(work: Iterable[asyncio.Future[Any]]) -> None:
    """Wait until all work has ended, also with errors; raise a cancellation only then."""
    pending, cancelled = set(work), None
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
            pending = {one for one in pending if not one.done()}
    if cancelled is not None:
        raise cancelled
