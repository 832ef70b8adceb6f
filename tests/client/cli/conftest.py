from __future__ import annotations

import sys

import pytest
from fake_server import FakeServer
from reltrace.cli import app


class Run:
    """Calls the command in this process.

    Attributes
    ----------
    terminal
        Whether the command is to take its output for one.
    """

    terminal = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["reltrace", *arguments])
        self._monkeypatch.setattr(sys.stdout, "isatty", lambda: self.terminal, raising=False)
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = self._capsys.readouterr()
        return int(caught.value.code or 0), out, err


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: FakeServer
) -> Run:
    monkeypatch.setenv("RELTRACE_SERVER", server.address)
    return Run(monkeypatch, capsys)
