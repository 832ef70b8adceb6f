"""What the log says of servers that are away."""

from __future__ import annotations

import logging
import re
import threading

import grpc
import pytest
import reltrace
from fake_server import FakeServer, queue_full, status_with

AWAY = "no answer from the reltrace server at"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reltrace.transport.retry._LOG_AFTER", 0.2)


def test_an_outage_is_told_once_and_so_is_its_end(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given many submissions on their way when the server goes away for a while
    I expect one line when it has been away, and one when it is back.
    """
    waiting = threading.Event()
    server.hold = lambda spec: (waiting.wait(20), None)[1]
    prompts = [f"p {number}" for number in range(600)]
    results: list[object] = []
    with (
        caplog.at_level(logging.WARNING, "reltrace"),
        reltrace.Client(server.address, retry_timeout=20) as client,
    ):
        run = threading.Thread(target=lambda: results.extend(client.trace_many(prompts)))
        run.start()
        with server.changed:
            assert server.changed.wait_for(lambda: len(server.submissions) >= 2, 10)
        waiting.set()
        server.stop()
        while not caplog.messages:
            assert run.is_alive()
        server.start()
        run.join(20)
    assert len(results) == 600
    away, *rest = caplog.messages
    assert away.startswith(AWAY)
    assert "; trying again for " in away
    assert all(message.endswith("answers again") or message.startswith(AWAY) for message in rest)
    assert rest[0].endswith("answers again")


def test_who_waits_for_room_is_told_once_and_why(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given a server whose queue is full all the time
    I expect one line in the log, and the reason in the error of each call whose time is over.
    """
    server.submit_errors += [queue_full(0.01)] * 1000
    told = "the server at .* can not accept the request: the queue is full"
    with (
        caplog.at_level(logging.WARNING, "reltrace"),
        reltrace.Client(server.address, retry_timeout=20) as client,
    ):
        for _ in range(2):
            with pytest.raises(reltrace.DeadlineExceeded, match=f"the timeout of 0.5 s: {told}$"):
                client.trace("a", timeout=0.5)
        server.submit_errors.clear()
        assert client.trace("a").tokens == ["<s>", "a"]
    (line,) = caplog.messages
    assert re.fullmatch(f"{told}; waiting until it can", line)
    # Nothing was accepted, so there is nothing to cancel.
    assert server.cancelled == []


def test_a_server_with_as_many_calls_as_it_takes(server: FakeServer) -> None:
    """gRPC itself refuses further ones, and names no delay."""
    refusal = status_with(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
    server.submit_errors += [refusal] * 3
    with reltrace.Client(server.address) as client:
        assert client.trace("p").target.token
    assert not server.submit_errors


def test_a_reason_that_is_over_is_not_told(server: FakeServer, stuck: FakeServer) -> None:
    server.submit_errors.append(queue_full(0.01))
    with (
        reltrace.Client(server.address) as client,
        pytest.raises(reltrace.DeadlineExceeded, match=r"the timeout of 1 s$"),
    ):
        client.trace("a", timeout=1)


def test_nobody_hears_of_it_who_does_not_listen(
    server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    address = server.address
    server.stop()
    with (
        reltrace.Client(address, retry_timeout=0.6) as client,
        pytest.raises(reltrace.Unavailable, match=AWAY),
    ):
        client.models()
    assert capfd.readouterr().err == ""


def test_a_model_without_a_worker_is_told_of_once(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given a model that has no worker at present
    If several jobs for it are accepted, of several calls
    I expect one warning that names it, and results when a worker has come.
    """
    server.unserved = {"asleep"}
    with (
        reltrace.Client(server.address) as client,
        caplog.at_level(logging.WARNING, "reltrace"),
    ):
        for _ in range(2):
            client.trace("a", model="fake")
            for _ in range(2):
                client.trace("a", model="asleep")
        assert len(list(client.trace_many(["a"] * 600, model="asleep"))) == 600
    assert caplog.messages == ["no worker serves asleep at present; its jobs wait for one"]
