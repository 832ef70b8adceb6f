"""Bounds how many results of slices are in memory, read and not yet merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

_BYTES = 256 * 1024 * 1024
_MIN, _MAX = 2, 8
"""One is merged while the next is read. Each of an 8B model has about 600 MB."""


class PrefetchLimit:
    """Two results at a time, and up to eight if so many fit 256 MiB.

    All results of an atlas are of about one size, which the first one tells.
    """

    def __init__(self) -> None:
        self._slots = _MIN
        self._taken = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Return what waits for a slot, at its first call; the slot is free again at the end.

        A slice that waits for its worker takes none: results that are ready can be read.
        """
        taken = False

        async def take() -> None:
            nonlocal taken
            if taken:
                return
            async with self._changed:
                await self._changed.wait_for(lambda: self._taken < self._slots)
                self._taken += 1
                taken = True

        try:
            yield take
        finally:
            if taken:
                self._taken -= 1
                await self._notify()

    async def measured(self, size: int) -> None:
        """Take the size of a result, in bytes."""
        self._slots = min(_MAX, max(_MIN, _BYTES // max(size, 1)))
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
