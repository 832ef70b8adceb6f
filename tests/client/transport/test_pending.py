"""What a caller leaves behind is cancelled on the server, and costs the caller no time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import reltrace
from fake_server import FakeServer, queue_full, status_with
from reltrace.transport import pending

PROMPTS = ["quick", "slow", "slow"]


def wait_submitted(server: FakeServer) -> None:
    with server.changed:
        assert server.changed.wait_for(lambda: server.submissions, 5)


def test_a_timeout_cancels_and_frees(stuck: FakeServer, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.3 s$"):
        client.trace("slow", timeout=0.3)
    stuck.wait_cancelled("s0-0")
    stuck.wait_acknowledged()


@pytest.mark.parametrize("ordered", [False, True])
def test_a_left_loop_cancels(stuck: FakeServer, client: reltrace.Client, ordered: bool) -> None:
    for result in client.trace_many(PROMPTS, ordered=ordered):
        assert result.id == 0
        break
    stuck.wait_cancelled("s0-1", "s0-2")


def test_a_generator_that_nobody_holds_cancels(stuck: FakeServer, client: reltrace.Client) -> None:
    results = client.trace_many(PROMPTS)
    next(results)
    del results
    gc.collect()
    stuck.wait_cancelled("s0-1", "s0-2")


def test_the_time_of_a_run_is_told_by_the_caller(
    stuck: FakeServer, client: reltrace.Client
) -> None:
    with pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.3 s$"):
        list(client.trace_many(PROMPTS, timeout=0.3))
    stuck.wait_cancelled("s0-1", "s0-2")


async def test_an_async_loop_that_is_left_cancels(stuck: FakeServer) -> None:
    async with reltrace.AsyncClient(stuck.address) as client:
        async for result in client.trace_many(PROMPTS):
            assert result.id == 0
            break
    stuck.wait_cancelled("s0-1", "s0-2")


async def test_a_cancelled_task_cancels(stuck: FakeServer) -> None:
    async with reltrace.AsyncClient(stuck.address) as client:
        task = asyncio.create_task(client.trace("slow"))
        await asyncio.to_thread(wait_submitted, stuck)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    stuck.wait_cancelled("s0-0")


def close_while_it_waits(server: FakeServer) -> list[str]:
    client = reltrace.Client(server.address)
    errors = []

    def wait() -> None:
        try:
            client.trace("slow")
        except reltrace.TraceError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_submitted(server)
    client.close()
    waiting.join(10)
    return errors


def test_closing_the_client_cancels_what_others_read(stuck: FakeServer) -> None:
    assert close_while_it_waits(stuck) == ["the client is closed"]
    stuck.wait_cancelled("s0-0")


def test_closing_the_client_cancels_what_others_hand_in(stuck: FakeServer) -> None:
    """
    Given a submission that the server has stored and not answered
    If the client is closed
    I expect the server to be asked for it under the same key, and its job to be cancelled.
    """
    answer = threading.Event()

    def late() -> None:
        if len(stuck.requests) == 1:
            answer.wait(20)

    stuck.before_answer = late
    assert close_while_it_waits(stuck) == ["the client is closed"]
    answer.set()
    stuck.wait_cancelled("s0-0")
    first, second = stuck.requests
    assert first == second


def test_jobs_that_a_full_queue_refused_are_not_handed_in_again(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.submit_errors += [queue_full(30)]
    with pytest.raises(reltrace.DeadlineExceeded):
        client.trace("x", timeout=0.2)
    client.close()
    assert len(server.requests) == 1
    assert server.jobs_submitted() == 0


def test_nobody_waits_for_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in ("_ABANDON_WAIT", "_CLOSE_WAIT"):
        monkeypatch.setattr(pending, wait, 30.0)
    started = time.monotonic()
    with (
        reltrace.Client("127.0.0.1:1") as client,
        pytest.raises(reltrace.DeadlineExceeded),
    ):
        client.trace("x", timeout=0.3)
    assert time.monotonic() - started < 10


def test_what_ended_or_expired_is_not_cancelled(
    server: FakeServer, client: reltrace.Client
) -> None:
    client.trace("x")
    assert len(list(client.trace_many(PROMPTS))) == 3
    server.stream_errors += [status_with(grpc.StatusCode.NOT_FOUND, "expired")] * 4
    with pytest.raises(reltrace.NotFound, match="expired"):
        client.trace("x")
    client.close()
    assert server.cancelled == []


def test_a_server_that_refuses_to_cancel_hides_nothing(
    stuck: FakeServer, client: reltrace.Client
) -> None:
    def before(method: str) -> None:
        if method == "CancelJobs":
            raise RuntimeError("no")

    stuck.before = before
    with pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.3 s$"):
        client.trace("slow", timeout=0.3)


def test_the_server_is_told_of_the_timeout(server: FakeServer, client: reltrace.Client) -> None:
    client.trace("x", timeout=60)
    list(client.trace_many(["x"], timeout=60))
    client.trace("x")
    client.trace("x", timeout=1e9)
    client.trace("x", timeout=float("inf"))
    jobs = [request.jobs[0] for request in server.requests]
    assert [60 < job.timeout.seconds <= 65 for job in jobs[:2]] == [True, True]
    assert not jobs[2].HasField("timeout")
    # The longest that a server takes.
    assert jobs[3].timeout.ToTimedelta().days == 31
    assert not jobs[4].HasField("timeout")


def test_a_timeout_of_months_is_as_long_as_the_server_takes(
    server: FakeServer, client: reltrace.Client
) -> None:
    client.trace("x", timeout=1e9)
    assert server.requests[0].jobs[0].timeout.ToTimedelta().days == 31


def test_a_submission_without_an_answer_is_looked_up_and_cancelled(
    server: FakeServer, client: reltrace.Client
) -> None:
    """
    Given a server that stores a submission and answers too late
    I expect the same key to be asked for again, and its jobs to be cancelled.
    """
    late = threading.Event()

    def first_is_late() -> None:
        if len(server.requests) == 1:
            late.wait(20)

    server.before_answer = first_is_late
    with pytest.raises(reltrace.DeadlineExceeded):
        client.trace("x", timeout=0.3)
    server.wait_cancelled("s0-0")
    late.set()
    first, second = server.requests
    assert first == second


def test_a_source_that_raises_lets_its_items_finish(
    server: FakeServer, client: reltrace.Client
) -> None:
    def items() -> Iterator[str]:
        yield from PROMPTS
        raise KeyError("the file broke off")

    seen = []
    with pytest.raises(KeyError, match="broke off"):
        seen.extend(client.trace_many(items()))
    assert server.jobs_submitted() == 3
    assert server.cancelled == []
