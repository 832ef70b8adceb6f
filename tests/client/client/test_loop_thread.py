"""The event loop behind the synchronous clients."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import reltrace
from fake_server import FakeServer
from reltrace.client import loop_thread


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take SIGINT as Python does by default: a shell in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_does_not_wake_the_waiting_thread_is_noticed() -> None:
    """As when it arrives between the last look for signals and the sleep on a lock."""
    ended = threading.Event()

    async def interrupted() -> None:
        try:
            # The waiting thread is the main one: it is told, but it is not woken.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        loop_thread.shared().run(interrupted())
    assert ended.wait(30)


def test_a_timeout_of_the_work_itself_is_raised() -> None:
    async def late() -> None:
        async with asyncio.timeout(2 * loop_thread._SIGNAL_CHECK_INTERVAL):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        loop_thread.shared().run(late())


def test_work_that_takes_longer_than_a_look_gives_its_result() -> None:
    async def slow() -> int:
        await asyncio.sleep(2.5 * loop_thread._SIGNAL_CHECK_INTERVAL)
        return 7

    assert loop_thread.shared().run(slow()) == 7


def test_what_ends_on_the_loops_own_thread_is_not_waited_for() -> None:
    """As when an iterator is closed by the garbage collector, which runs in any thread."""
    loop = loop_thread.shared()
    ended = threading.Event()

    async def end() -> None:
        await asyncio.sleep(0)
        ended.set()

    async def collect() -> None:
        loop.finish(end())
        assert not ended.is_set()

    loop.run(collect())
    assert ended.wait(5)
    ended.clear()
    loop.finish(end())
    assert ended.is_set()


def test_a_forked_child_is_told_why_it_can_not_use_a_client(
    server: FakeServer, client: reltrace.Client
) -> None:
    results = client.trace_many(["a"] * 50, max_in_flight=2)
    assert isinstance(next(results), reltrace.Trace)
    uses: list[Callable[[], object]] = [lambda: client.trace("b"), lambda: next(results)]
    for use in uses:
        assert in_a_child(use) == (
            "TraceError: this client was made before the process was forked; a client was open in "
            "its parent, and gRPC can not be used in a process that is forked then: start it by "
            'the method "spawn" or "forkserver" of multiprocessing, or close the client before the '
            "fork and make a new one in each process"
        )
    assert in_a_child(client.close) == "nothing"
    # To the parent all of this is nothing.
    assert len(list(results)) == 49
    assert client.trace("c").tokens == ["<s>", "c"]


def in_a_child(use: Callable[[], object]) -> str:
    """Do something in a forked child; return what came of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Of the kernel's: a child that hangs does not end by a time of Python's.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            try:
                use()
                told = "nothing"
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
            os.write(writing, told.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answers:  # noqa: PTH123 - a number, and no path
        told = answers.read().decode()
    os.waitpid(child, 0)
    return told
