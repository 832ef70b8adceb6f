"""How many results of slices are in memory at a time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from reltrace.atlas.jobs import PrefetchLimit


async def slots_of(limit: PrefetchLimit, wanted: int) -> int:
    """Return how many of `wanted` slices get a slot."""
    async with AsyncExitStack() as stack:
        takes = [await stack.enter_async_context(limit.slot()) for _ in range(wanted)]
        waiting = [asyncio.create_task(take()) for take in takes]
        # Tasks that get a slot do so within a few iterations of the event loop.
        for _ in range(10 * wanted):
            await asyncio.sleep(0)
        found = sum(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return found


@pytest.mark.parametrize(
    ("part", "slots"), [(None, 2), (613 << 20, 2), (100 << 20, 2), (64 << 20, 4), (0, 8)]
)
async def test_results_that_fit_get_slots_and_always_two(part: int | None, slots: int) -> None:
    limit = PrefetchLimit()
    if part is not None:
        limit.measure(part)
    assert await slots_of(limit, 10) == slots
    # All slots are free again.
    assert await slots_of(limit, 10) == slots


async def test_a_waiting_slice_gets_the_slot_that_another_frees() -> None:
    limit = PrefetchLimit()
    async with limit.slot() as third:
        async with limit.slot() as first, limit.slot() as second:
            await first()
            # A second call takes no second slot.
            await first()
            await second()
            waiting = asyncio.create_task(third())
            for _ in range(10):
                await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 30)
