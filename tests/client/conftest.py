from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import reltrace
from fake_server import FakeServer


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own RELTRACE_... settings must not reach the tests."""
    import os

    for name in list(os.environ):
        if name.startswith("RELTRACE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[reltrace.Client]:
    with reltrace.Client(server.address) as connected:
        yield connected


@pytest.fixture
def stuck(server: FakeServer) -> Iterator[FakeServer]:
    """A server whose jobs do not end, but for those of the prompt "quick"."""
    release = threading.Event()
    server.hold = lambda spec: None if spec.prompt == "quick" else (release.wait(30), None)[1]
    yield server
    release.set()
