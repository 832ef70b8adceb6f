"""How many parts of an atlas are held at once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from reltrace.atlas.prefetch import Room


async def places_of(room: Room, wanted: int) -> int:
    """Return how many of so many are let in."""
    async with AsyncExitStack() as stack:
        takes = [await stack.enter_async_context(room.place()) for _ in range(wanted)]
        waiting = [asyncio.create_task(take()) for take in takes]
        # Who is let in is so within a few turns of the loop.
        for _ in range(10 * wanted):
            await asyncio.sleep(0)
        found = sum(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return found


@pytest.mark.parametrize(
    ("part", "places"), [(None, 2), (613 << 20, 2), (100 << 20, 2), (64 << 20, 4), (0, 8)]
)
async def test_parts_are_held_that_fit_but_always_two(part: int | None, places: int) -> None:
    room = Room()
    if part is not None:
        await room.measured(part)
    assert await places_of(room, 10) == places
    # All have left: as many may come again.
    assert await places_of(room, 10) == places


async def test_who_waits_is_let_in_by_who_leaves() -> None:
    room = Room()
    async with room.place() as third:
        async with room.place() as first, room.place() as second:
            await first()
            # Of one that has its place no other is taken.
            await first()
            await second()
            waiting = asyncio.create_task(third())
            for _ in range(10):
                await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 30)
