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
