"""Work in threads that is waited for, also by those who are cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest
from reltrace.calls.threads import gather_shielded, shielded_to_thread


async def test_what_a_thread_returns_or_raises_is_returned_or_raised() -> None:
    assert await shielded_to_thread(divmod, 7, 4) == (1, 3)
    with pytest.raises(ZeroDivisionError):
        await shielded_to_thread(divmod, 7, 0)


async def test_who_is_cancelled_however_often_leaves_after_the_thread() -> None:
    began, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        goes_on.wait(30)
        ended.set()

    async def call() -> bool:
        try:
            await shielded_to_thread(work)
        except asyncio.CancelledError:
            return ended.is_set()
        return False

    task = asyncio.create_task(call())
    assert await asyncio.to_thread(began.wait, 30)
    for _ in range(2):
        task.cancel()
        # One turn of the loop each: an error on the way would end it here.
        await asyncio.wait({task}, timeout=0.05)
        assert not task.done()
    goes_on.set()
    assert await task


async def test_what_is_waited_for_may_fail() -> None:
    async def fail() -> None:
        raise ValueError("as told")

    task = asyncio.create_task(fail())
    await gather_shielded([task, asyncio.create_task(asyncio.sleep(0))])
    assert isinstance(task.exception(), ValueError)
