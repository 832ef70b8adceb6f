"""Workers and clients spread over schedulers that come later, without losing a thing."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import reltrace
from bench.idle_worker import LAYERS, TOKENS, IdleRunner, result_of, session_of
from reltrace_proto.v1 import worker_pb2
from reltrace_scheduler import limits
from reltrace_scheduler.api import server
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue.connection import connect
from reltrace_worker.session.leases import Chunks

WORKERS = 8
AGE = 0.5


@pytest.fixture
async def redis_url(tmp_path: Path) -> AsyncIterator[str]:
    server = EmbeddedRedis(tmp_path / "redis")
    yield await server.start()
    await server.stop()


@asynccontextmanager
async def scheduler(redis_url: str, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """A scheduler in this process, with connections that are soon over; gives its address."""
    connection = await connect(redis_url)
    settings = replace(Settings(), listen=listen, connection_age=AGE)
    async with serving(connection, settings) as address:
        yield address
    await connection.redis.aclose()


@asynccontextmanager
async def workers(addresses: str) -> AsyncIterator[None]:
    """Workers that answer at once."""
    results = result_of(4 * LAYERS * TOKENS, 1 << 20)
    sessions = [
        session_of(addresses, "tiny", results, worker_id=f"idle-{n}", seed=n)
        for n in range(WORKERS)
    ]
    working = [asyncio.create_task(session.run()) for session in sessions]
    yield
    assert not [task for task in working if task.done()]
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)


def connections(address: str) -> int:
    """Count the connections that this process has made to a scheduler."""
    port = int(address.rpartition(":")[2])
    return sum(
        bool(made.raddr) and made.raddr.port == port and made.status == psutil.CONN_ESTABLISHED
        for made in psutil.Process().net_connections("tcp")
    )


async def eventually(condition: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen within 60 s") from None


async def test_a_scheduler_that_comes_back_gets_workers_again(redis_url: str) -> None:
    """
    Given two schedulers that are replaced one after the other, and workers that have both addresses
    I expect all workers to be with the one that is left, then some with each.
    """
    async with AsyncExitStack() as stack:
        running = [AsyncExitStack(), AsyncExitStack()]
        for each in running:
            stack.push_async_callback(each.aclose)
        addresses = [await each.enter_async_context(scheduler(redis_url)) for each in running]
        await stack.enter_async_context(workers(",".join(addresses)))
        for turn in (0, 1):
            await running[turn].aclose()
            await eventually(
                lambda turn=turn: connections(addresses[1 - turn]) >= WORKERS, "all move"
            )
            await running[turn].enter_async_context(scheduler(redis_url, addresses[turn]))
        await eventually(lambda: all(map(connections, addresses)), "both have workers")


async def test_nobody_notices(
    redis_url: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Given connections that are over after half a second, at both of two schedulers
    If a client traces for several of their lives
    I expect all results, no job leased twice, and no warning in any log.
    """
    caplog.set_level(logging.WARNING)
    add, leased, traced = IdleRunner.add, 0, 0

    async def counting(self: IdleRunner, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        nonlocal leased
        leased += len(leases)
        return await add(self, leases)

    monkeypatch.setattr(IdleRunner, "add", counting)
    async with AsyncExitStack() as stack:
        addresses = ",".join(
            [await stack.enter_async_context(scheduler(redis_url)) for _ in range(2)]
        )
        await stack.enter_async_context(workers(addresses))
        client = await stack.enter_async_context(reltrace.AsyncClient(addresses))
        async with asyncio.timeout(60):
            while not await client.models():
                await asyncio.sleep(0.05)
        sizes, over = random.Random(0), time.monotonic() + 6 * AGE
        while time.monotonic() < over:
            items = [{"input_ids": [1, 2, 3, 4], "model": "tiny"}] * sizes.randrange(1, 600)
            found = [item async for item in client.trace_many(items, timeout=60)]
            assert [type(item) for item in found] == [reltrace.Trace] * len(items)
            traced += len(items)
        assert (await client.status()).ended == {"SUCCEEDED": traced}
    assert leased == traced
    assert caplog.records == []
    assert "[warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "most", [pytest.param(limits.MAX_CONCURRENT_STREAMS, marks=pytest.mark.slow), 10]
)
async def test_a_thousand_calls_at_a_time_over_one_connection(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """However many of them a connection takes at a time: the others wait."""
    options = dict(server._OPTIONS) | {"grpc.max_concurrent_streams": most}
    monkeypatch.setattr(server, "_OPTIONS", tuple(options.items()))
    count = 1000 if most > 1000 else 100
    async with (
        scheduler(redis_url) as address,
        workers(address),
        reltrace.AsyncClient(address) as client,
    ):
        async with asyncio.timeout(60):
            while not await client.models():
                await asyncio.sleep(0.05)
            calls = [client.trace(input_ids=[1, 2, n], model="tiny") for n in range(count)]
            traces = await asyncio.gather(*calls)
    assert len({trace.job_id for trace in traces}) == count
