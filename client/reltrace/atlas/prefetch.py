"""Room for what is read and not yet merged: a bound of bytes, however large one part is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

_BYTES = 256 * 1024 * 1024
_LEAST, _MOST = 2, 8
"""One that is merged while the next is read; each part of an 8B model has about 600 MB."""


class Room:
    """Places of parts that are read; who finds none free waits for one to be merged.

    All parts of an atlas are of about one size, which the first tells. Until then there are two
    places, and two there are always; more, up to eight, where they fit 256 MiB.
    """

    def __init__(self) -> None:
        self._places = _LEAST
        self._taken = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Give what takes a place, once, when it is awaited; it is free again at the end.

        Who only waits for a result to be made takes none: those that are made can be read.
        """
        taken = False

        async def take() -> None:
            nonlocal taken
            if taken:
                return
            async with self._changed:
                await self._changed.wait_for(lambda: self._taken < self._places)
                self._taken += 1
                taken = True

        try:
            yield take
        finally:
            if taken:
                self._taken -= 1
                await self._tell()

    async def measured(self, part: int) -> None:
        """Note the size of a part, in bytes."""
        self._places = min(_MOST, max(_LEAST, _BYTES // max(part, 1)))
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
