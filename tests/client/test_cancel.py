"""What a caller gives up is cancelled on the server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest
import reltrace
from fake_server import FakeServer, status_with

PROMPTS = ["a b", "c d", "e f"]


@pytest.fixture
def stuck(server: FakeServer) -> Iterator[FakeServer]:
    """A server whose jobs do not end, but for those whose prompt begins with "a"."""
    release = threading.Event()

    def hold(spec: object) -> None:
        if not getattr(spec, "prompt", "").startswith("a"):
            release.wait(20)

    server.hold = hold
    yield server
    release.set()


def test_a_timeout_cancels(stuck: FakeServer, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.3 s"):
        client.trace("stuck", timeout=0.3)
    stuck.wait_cancelled("s0-0")


def test_the_server_knows_of_the_timeout(server: FakeServer, client: reltrace.Client) -> None:
    """A little more than the caller's own, which is to be told by the client."""
    client.trace("x", timeout=60)
    client.trace("x")
    first, second = (request.jobs[0] for request in server.requests)
    assert 60 < first.timeout.ToTimedelta().total_seconds() <= 65
    assert not second.HasField("timeout")


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


def test_leaving_a_loop_cancels_what_has_not_come(
    stuck: FakeServer, client: reltrace.Client
) -> None:
    for result in client.trace_many(PROMPTS):
        assert result.id == 0
        break
    stuck.wait_cancelled("s0-1", "s0-2")


def test_a_run_whose_time_is_over_cancels(stuck: FakeServer, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.DeadlineExceeded):
        list(client.trace_many(PROMPTS, timeout=0.5))
    stuck.wait_cancelled("s0-1", "s0-2")


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


def test_closing_the_client_cancels_what_others_wait_for(stuck: FakeServer) -> None:
    client = reltrace.Client(stuck.address)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            client.trace("stuck")
        except reltrace.TraceError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    with stuck.changed:
        assert stuck.changed.wait_for(lambda: stuck.submissions, 5)
    client.close()
    stuck.wait_cancelled("s0-0")
    waiting.join(5)
    assert [str(error) for error in errors] == ["the client is closed"]


async def test_a_task_that_is_cancelled_cancels(stuck: FakeServer) -> None:
    async with reltrace.AsyncClient(stuck.address) as client:
        call = asyncio.create_task(client.trace("stuck"))
        while not stuck.streams:
            await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    stuck.wait_cancelled("s0-0")


def test_what_has_ended_is_not_cancelled(server: FakeServer, client: reltrace.Client) -> None:
    client.trace("x")
    assert len(list(client.trace_many(PROMPTS))) == 3
    client.close()
    assert server.cancelled == []


def test_results_that_expired_are_not_cancelled(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.stream_errors.append(status_with(grpc.StatusCode.NOT_FOUND, "expired"))
    with pytest.raises(reltrace.NotFound, match="expired"):
        client.trace("x")
    assert server.cancelled == []


def test_a_server_that_can_not_cancel_does_not_hide_the_timeout(stuck: FakeServer) -> None:
    def before(method: str) -> None:
        if method == "CancelJobs":
            raise RuntimeError("no")

    stuck.before = before
    with (
        reltrace.Client(stuck.address) as client,
        pytest.raises(reltrace.DeadlineExceeded, match=r"timeout of 0\.3 s"),
    ):
        client.trace("stuck", timeout=0.3)


def test_jobs_by_their_ids(stuck: FakeServer, client: reltrace.Client) -> None:
    trace = client.trace("a b")
    assert trace.job_id == "s0-0"
    results = client.trace_many(["a", "b", "c"])
    assert next(results).job_id == "s1-0"
    states = [job.state for job in client.jobs("s1-1", "s7-0")]
    assert states == ["leased", None]
    assert client.cancel("s1-1", "s7-0") == 1
    assert client.cancel("s1") == 1
    assert [job.state for job in client.jobs("s1-1")] == ["cancelled"]
    with pytest.raises(reltrace.NotFound):
        client.cancel("s7")


@pytest.mark.parametrize("wrong", ["", "a b", 7, "s1-x", "s1-2-3"])
def test_ids_that_are_none(client: reltrace.Client, wrong: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"ids\[1\]: must be"):
        client.cancel("s1", wrong)
    with pytest.raises(reltrace.InvalidArgument, match=r"ids\[0\]: must be a job id"):
        client.jobs(wrong)


def test_priority(server: FakeServer, client: reltrace.Client) -> None:
    client.trace("x")
    client.trace("x", priority="batch")
    list(client.trace_many(["x"], priority="batch"))
    assert [request.priority for request in server.requests] == [1, 2, 2]


@pytest.mark.parametrize("wrong", ["urgent", None, 1, ["batch"]])
def test_a_priority_that_is_none(client: reltrace.Client, wrong: object) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="priority: must be one of interactive, ba"):
        client.trace("x", priority=wrong)  # type: ignore[call-overload]
    with pytest.raises(reltrace.InvalidArgument, match="priority: must be one of"):
        client.trace_many(["x"], priority=wrong)  # type: ignore[call-overload]
