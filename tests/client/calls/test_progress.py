"""`trace_many(progress=True)`: a bar that disturbs nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import nbformat
import pytest
import reltrace
from fake_results import failed_chunk
from fake_server import FakeServer
from google.rpc import code_pb2
from nbclient import NotebookClient
from reltrace.calls import progress as module
from reltrace.calls.progress import Progress, Rate
from reltrace_proto.v1 import types_pb2


@pytest.fixture
def failing(server: FakeServer) -> Iterator[FakeServer]:
    """A server on which every job fails."""
    server.run = lambda spec, job_id: [
        failed_chunk(job_id, types_pb2.JOB_STATE_FAILED, code_pb2.INTERNAL, "it broke")
    ]
    return server


def test_the_bar_shows_count_rate_and_failures(
    failing: FakeServer, client: reltrace.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    list(client.trace_many(["a", "b", "c"], progress=True))
    bar = capsys.readouterr().err
    assert "3/3" in bar
    assert "trace/s" in bar
    assert "failed=3" in bar


def test_without_failures_the_bar_speaks_of_none(
    client: reltrace.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    list(client.trace_many(iter(["a", "b"]), progress=True))
    bar = capsys.readouterr().err
    assert "2trace" in bar
    assert "failed" not in bar


def test_no_bar_unless_asked_for(
    client: reltrace.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    list(client.trace_many(["a"]))
    assert capsys.readouterr().err == ""


def run_cell(source: str) -> str:
    """Run a cell in a kernel, which has an event loop of its own; return what it shows."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(book, timeout=60, kernel_name="python3").execute()
    return "".join(
        output.get("text", "") or str(output.get("data", "")) for output in book.cells[0].outputs
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_the_bar_and_no_warning(server: FakeServer, widgets: bool) -> None:
    """
    Given a notebook, with and without ipywidgets, whose kernel runs an event loop
    I expect the synchronous client to work, its bar to be shown, and no warning.
    """
    missing = "import sys; sys.modules['ipywidgets'] = None\n" if not widgets else ""
    shown = run_cell(
        missing
        + "import asyncio, reltrace\n"
        + "assert asyncio.get_running_loop().is_running()\n"
        + f"client = reltrace.Client({server.address!r})\n"
        + "print(len(list(client.trace_many(['a', 'b'], progress=True))), 'traces')\n"
        + "client.close()\n"
    )
    assert "2 traces" in shown
    assert "Warning" not in shown
    assert ("2/2" in shown) or widgets


def test_a_bar_that_is_loaded_under_warnings_as_errors(server: FakeServer) -> None:
    script = (
        "import sys, reltrace\n"
        "with reltrace.Client(sys.argv[1]) as client:\n"
        "    print(len(list(client.trace_many(['a', 'b'], progress=True))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, server.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "2\n"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def burst(rate: Rate, clock: Clock, *, after: float, results: int) -> None:
    """Let results come one by one, a millisecond apart."""
    clock.now += after
    for _ in range(results):
        rate.add(1)
        clock.now += 0.001


def test_a_rate_is_that_of_passes_and_not_of_what_came_before() -> None:
    """
    Given jobs that wait two minutes for those of others, and then come 30 at a time every 10 s
    I expect no rate before the second time, and then that of the passes.
    """
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second() is None
    burst(rate, clock, after=120.0, results=30)
    assert rate.per_second() is None
    for _ in range(9):
        burst(rate, clock, after=10.0, results=30)
        assert rate.per_second() == pytest.approx(3.0, rel=0.01)


def test_a_rate_forgets_what_was_long_ago() -> None:
    clock = Clock()
    rate = Rate(clock)
    for _ in range(100):
        burst(rate, clock, after=1.0, results=10)
    for _ in range(7):
        burst(rate, clock, after=10.0, results=10)
    assert rate.per_second() == pytest.approx(1.0, rel=0.2)
    # However long one takes, there is a rate: that of the last two.
    burst(rate, clock, after=600.0, results=60)
    burst(rate, clock, after=600.0, results=60)
    assert rate.per_second() == pytest.approx(0.1, rel=0.01)
    assert len(rate._moments) < 10


def test_a_steady_stream_has_its_rate() -> None:
    clock = Clock()
    rate = Rate(clock)
    for _ in range(20_000):
        rate.add(1)
        clock.now += 0.01
    assert rate.per_second() == pytest.approx(100.0, rel=0.02)


def test_a_bar_tells_no_time_left_before_it_can_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Given a run that goes on with 200 of 300 done, whose first results come after two minutes
    I expect "?" until there have been two passes, then the rest by their rate, and at the end the
    rate of the run.
    """
    clock = Clock()
    monkeypatch.setattr(module, "Rate", lambda: Rate(clock))
    progress = Progress(None, shown=True, total=300, interval=0.0)
    progress.begin(200)
    clock.now += 120
    progress.add(10)
    assert "210/300" in (drawn := capsys.readouterr().err)
    assert drawn.count("<?, ?trace/s]") == drawn.count("|") / 2
    clock.now += 10
    progress.add(10)
    assert "220/300" in (drawn := capsys.readouterr().err)
    # 80 more, one a second.
    assert "<01:20,  1.00trace/s]" in drawn
    progress.close()
    assert "?" not in capsys.readouterr().err
