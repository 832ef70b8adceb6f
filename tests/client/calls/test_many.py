"""The waits of `trace_many`: whoever is cancelled ends, and whoever is full waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from reltrace import Failure, InvalidArgument
from reltrace.calls import source
from reltrace.calls import trace_many as many
from reltrace.calls.trace_many import TraceManyRun
from reltrace.transport.retry import Deadline
from reltrace.types.request import Arguments

_STEPS = 20
"""Of the loop: more than any of these waits needs to begin, or to end."""


def a_run(*, limit: int = 1, ordered: bool = False) -> TraceManyRun:
    """Return a run that nothing has been asked of, and that has no server."""
    return TraceManyRun(
        None,  # type: ignore[arg-type]
        [],
        Arguments(),
        ordered=ordered,
        max_in_flight=limit,
        deadline=Deadline(600.0),
    )


async def steps() -> None:
    for _ in range(_STEPS):
        await asyncio.sleep(0)


async def cancelled_as_it_comes(wait: Coroutine[Any, Any, Any], what: asyncio.Event) -> None:
    """Cancel a wait in the step of the loop in which its event is set."""
    task = asyncio.create_task(wait)
    await steps()
    assert not task.done()
    what.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_comes_with_room_is_not_lost() -> None:
    run = a_run(limit=1)
    run._in_flight = 1
    await cancelled_as_it_comes(run._wait_taken(600.0), run._result_taken)


async def test_a_cancellation_that_comes_with_news_is_not_lost() -> None:
    run = a_run()
    run._feeder = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    await cancelled_as_it_comes(run.take(), run._result_ready)
    await run.close()


async def test_a_cancellation_that_comes_with_an_item_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_LINGER", 600.0)

    waiting = source.Source()
    await cancelled_as_it_comes(waiting.take(1, wait=False), waiting._arrived)


async def test_a_stream_waits_while_results_in_order_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Given results that come in order, and a caller who takes none
    I expect their stream to be held up past the bound, and no longer than until there are none.
    """
    monkeypatch.setattr(many, "_MAX_UNREAD_BYTES", 100)
    run = a_run(limit=100, ordered=True)
    run._feeder = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    result = Failure("x", InvalidArgument("x"))
    for index in (0, 1):
        run._emit(index, result, 60)
    this, other = (asyncio.create_task(run._throttle({index})) for index in (2, 3))
    await steps()
    assert not this.done()
    assert await run.take() == [result] * 2
    for index in (4, 5):
        # Of a third stream, before their turn: what is held stays above the bound.
        run._emit(index, result, 60)
    taking = asyncio.create_task(run.take())
    await steps()
    assert this.done()
    assert not other.done()
    run._emit(2, result, 60)
    assert await taking == [result]
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    await run.close()


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ValueError("no more")])
async def test_an_async_source_that_breaks_off_is_not_at_its_end(error: BaseException) -> None:
    async def items() -> AsyncIterator[str]:
        yield "one"
        # As when what the source itself waits for was cancelled by somebody.
        raise error

    items_source = source.open_source(items())
    assert await items_source.take(5, wait=True) == ["one"]
    with pytest.raises(Exception, match=r"CancelledError|no more"):
        await items_source.take(5, wait=True)
    await items_source.close()


async def test_an_async_source_can_be_closed_while_it_is_waited_for() -> None:
    ended = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        try:
            await asyncio.Event().wait()
            yield "never"
        finally:
            ended.set()

    items_source = source.open_source(items())
    taking = asyncio.create_task(items_source.take(5, wait=True))
    await steps()
    taking.cancel()
    await items_source.close()
    assert ended.is_set()
