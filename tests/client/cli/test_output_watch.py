"""`--watch`: views that are refreshed, and how they end."""

from __future__ import annotations

import codecs
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from cli.conftest import Run
from fake_server import FakeServer
from reltrace.cli import output
from reltrace.cli.server import jobs_per_second
from rich.text import Text

# Python's own handler: a test run that ignores SIGINT would hand that down.
CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from reltrace.cli.app import main; main()"
)


def start(*options: str, stdout: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", CODE, *options, "--watch", "--every", "0.1"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
    )


def end(watching: subprocess.Popen[str]) -> None:
    watching.kill()
    watching.communicate()


def value_of(command: str, state: Any) -> str:
    return str(state["redis_version"] if command == "status" else state[0]["id"])


@pytest.mark.parametrize(("command", "value"), [("status", "7.2"), ("workers", "w1")])
def test_json_has_a_line_for_every_refresh(server: FakeServer, command: str, value: str) -> None:
    """
    Given a command with --watch and --json
    I expect a line of JSON for every refresh, and exit code 0 on Ctrl-C.
    """
    options = (command, "--json", "--server", server.address)
    watching = start(*options, stdout=subprocess.PIPE)
    try:
        assert watching.stdout is not None
        for _ in range(3):
            assert value_of(command, json.loads(watching.stdout.readline())) == value
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=20)
        assert (watching.returncode, errors) == (0, "")
    finally:
        end(watching)


@pytest.mark.parametrize(
    ("command", "change", "words"),
    [
        ("status", ("succeeded", 123_456), ["ended: 5 succeeded", "123,456 succeeded", "/s)"]),
        ("workers", ("drained", ["w1"]), ["w1", "w1 (draining)"]),
    ],
)
def test_a_terminal_shows_changes(
    server: FakeServer, command: str, change: tuple[str, Any], words: list[str]
) -> None:
    """
    Given a command with --watch in a terminal
    If what it shows changes
    I expect the view to show it, and exit code 0 on Ctrl-C.
    """
    ours, theirs = pty.openpty()
    watching = start(command, "--server", server.address, stdout=theirs)
    os.close(theirs)
    alarm = threading.Timer(20, watching.kill)
    alarm.start()
    try:
        seen = ""
        # What is read may end within a character.
        decoder = codecs.getincrementaldecoder("utf-8")()
        for word in words:
            while word not in seen:
                # Ends with an error once the command has.
                seen += decoder.decode(os.read(ours, 65536))
            setattr(server, *change)
        watching.send_signal(signal.SIGINT)
        while True:
            try:
                seen += decoder.decode(os.read(ours, 65536))
            except OSError:
                break
        assert watching.wait(20) == 0
    finally:
        alarm.cancel()
        end(watching)
        os.close(ours)


def test_a_watched_view_is_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0, 40, 100])
    drawn: list[str] = []
    monkeypatch.setattr(output.time, "sleep", lambda seconds: None)

    def look() -> tuple[int, Text]:
        count = next(looks, None)
        if count is None:
            raise KeyboardInterrupt
        drawn.append(f"{count} jobs")
        return count, Text(drawn[-1])

    output.show(look, output.Watch(watch=True))
    assert drawn == ["0 jobs", "40 jobs", "100 jobs"]


def test_the_rate_is_measured_since_the_previous_view() -> None:
    assert jobs_per_second((10.0, 5), (12.0, 45)) == 20.0
    # A server that restarted counts from zero.
    assert jobs_per_second((12.0, 45), (14.0, 0)) == 0.0


def test_a_refresh_period_must_be_positive(command: Run) -> None:
    code, _, err = command("status", "--watch", "--every", "0")
    assert code == 2
    assert "--every" in err
