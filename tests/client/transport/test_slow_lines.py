"""Lines that are slow, and servers that never answer."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator

import pytest
import reltrace
from fake_server import FakeServer


class Line:
    """Passes bytes on to a server, at most so many per second in each direction."""

    def __init__(self, address: str, rate: float) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._pause = threading.Event()
        self._rate = rate
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listening.accept()
            except OSError:
                return
            its = socket.create_connection(self._server)
            for pair in ((ours, its), (its, ours)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(16384):
                self._pause.wait(len(data) / self._rate)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._pause.set()


@pytest.fixture
def line(server: FakeServer) -> Iterator[Line]:
    made = Line(server.address, 1024 * 1024)
    yield made
    made.close()


def test_a_large_message_has_the_time_that_a_slow_line_takes(
    line: Line, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a message that takes the line longer than a call may wait for its answer
    I expect it to be sent once, and answered.
    """
    monkeypatch.setattr("reltrace.transport.connection._CALL_TIMEOUT", 0.5)
    with reltrace.Client(line.address, retry_timeout=5) as client:
        client.trace("short", timeout=20)
        assert client.trace("x" * (3 << 20), timeout=60).tokens[0] == "<s>"
    assert [len(request.jobs) for request in server.requests] == [1, 1]


def test_a_server_that_never_answers_is_told_soon(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given an address at which connections are taken, and nothing is said
    I expect one line in the log long before the call is given up.
    """
    monkeypatch.setattr("reltrace.transport.retry._LOG_AFTER", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        caplog.at_level(logging.WARNING, "reltrace"),
        reltrace.Client(f"127.0.0.1:{silent.getsockname()[1]}", retry_timeout=20) as client,
        pytest.raises(reltrace.DeadlineExceeded),
    ):
        client.trace("x", timeout=2)
    (line,) = caplog.messages
    assert line.startswith("no answer from the reltrace server at 127.0.0.1:")
