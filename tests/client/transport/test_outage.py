"""What the log says of servers that are away."""

from __future__ import annotations

import logging
import threading

import pytest
import reltrace
from fake_server import FakeServer

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
