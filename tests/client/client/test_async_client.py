"""`AsyncClient`: the same calls, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import reltrace
from fake_server import FakeServer


async def test_trace(server: FakeServer) -> None:
    async with reltrace.AsyncClient(server.address) as client:
        trace = await client.trace("one two")
        assert trace.tokens == ["<s>", "one", "two"]
        several = await asyncio.gather(*(client.trace(f"p {i}") for i in range(50)))
    assert [trace.tokens[-1] for trace in several] == [str(i) for i in range(50)]
    # Closing waits for the acknowledgements.
    assert server.acknowledged == {f"s{i}": 1 for i in range(51)}


async def test_trace_many_takes_async_sources(server: FakeServer) -> None:
    pulled = 0

    async def source() -> AsyncIterator[str]:
        nonlocal pulled
        for index in range(30):
            pulled += 1
            yield f"p {index}"

    async with reltrace.AsyncClient(server.address) as client:
        taken = 0
        async for trace in client.trace_many(source(), ordered=True, max_in_flight=4):
            assert isinstance(trace, reltrace.Trace)
            assert trace.id == taken
            assert pulled - taken <= 4
            taken += 1
    assert taken == 30


async def test_an_error_of_an_async_source(server: FakeServer) -> None:
    async def source() -> AsyncIterator[str]:
        yield "p 0"
        raise OSError("gone")

    async with reltrace.AsyncClient(server.address) as client:
        results = client.trace_many(source())
        assert (await anext(results)).id == 0
        with pytest.raises(OSError, match="gone"):
            await anext(results)


async def test_a_call_can_be_cancelled(server: FakeServer) -> None:
    import threading

    started, ended = threading.Event(), threading.Event()
    server.hold = lambda spec: (started.set(), ended.wait(5), None)[2]
    async with reltrace.AsyncClient(server.address) as client:
        task = asyncio.create_task(client.trace("slow"))
        assert await asyncio.to_thread(started.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ended.set()


async def test_closing_ends_open_calls(server: FakeServer) -> None:
    import threading

    started, ended = threading.Event(), threading.Event()
    server.hold = lambda spec: (started.set(), ended.wait(5), None)[2]
    client = reltrace.AsyncClient(server.address)
    task = asyncio.create_task(client.trace("slow"))
    assert await asyncio.to_thread(started.wait, 5)
    await client.close()
    with pytest.raises(reltrace.TraceError, match="the client is closed"):
        await task
    with pytest.raises(reltrace.TraceError, match="the client is closed"):
        await client.trace("more")
    ended.set()


async def test_models_and_status(server: FakeServer) -> None:
    async with reltrace.AsyncClient(server.address) as client:
        (model,) = await client.models()
        status = await client.status()
    assert (model.name, model.layers, model.dtype, model.workers) == ("fake", 4, "bfloat16", 2)
    assert status.queues == (reltrace.Queue("fake", queued=3, leased=1),)
    assert status.workers[0].connected_at is not None
    assert status.workers[0].connected_at.isoformat() == "2023-11-14T22:13:20+00:00"
    assert status.workers[0].seen_at is None
    assert status.ended == {"succeeded": 5}


OTHER_LOOP = (
    "this client belongs to the event loop of its first call, and can not be used on another"
)


@pytest.mark.filterwarnings("error")
def test_a_client_on_a_second_loop_is_told_so(server: FakeServer) -> None:
    """
    Given a client that was used on one event loop
    I expect a clear error on another one, whether the first has been closed or not.
    """
    client = reltrace.AsyncClient(server.address)

    async def trace() -> str:
        return (await client.trace("a", timeout=20)).text

    async def trace_many() -> list[object]:
        return [result async for result in client.trace_many(["a", "b"], timeout=20)]

    first = asyncio.new_event_loop()
    assert first.run_until_complete(trace()) == "<s> a"
    for call in (trace, trace_many):
        with pytest.raises(reltrace.TraceError, match=OTHER_LOOP):
            asyncio.run(call())
    assert first.run_until_complete(trace()) == "<s> a"
    first.run_until_complete(client.close())
    first.close()
    client = reltrace.AsyncClient(server.address)
    asyncio.run(trace())
    with pytest.raises(reltrace.TraceError, match=OTHER_LOOP):
        asyncio.run(trace())
    assert len(server.requests) == 3


def test_a_synchronous_client_in_a_notebook(server: FakeServer) -> None:
    """There a loop runs already, which some make reentrant."""

    async def cell() -> list[str]:
        with reltrace.Client(server.address) as client:
            texts = [client.trace("a").text]
            texts += [trace.text for trace in client.trace_many(["b"])]
        return texts

    assert asyncio.run(cell()) == ["<s> a", "<s> b"]
