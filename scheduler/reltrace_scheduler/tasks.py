"""Cancels background tasks and waits for them."""

import asyncio
from collections.abc import Iterable
from typing import Any

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
