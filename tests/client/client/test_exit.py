"""A process that ends, in order or by Ctrl-C: quickly, and nothing is left on the server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fake_server import FakeServer

# With Python's own SIGINT: a shell in the background has it ignored.
START = (
    "import signal, sys, reltrace\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "client = reltrace.Client(sys.argv[1])\n"
)


@contextmanager
def script(text: str, server: FakeServer) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", START + text, server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_a_script_may_end_inside_a_run(stuck: FakeServer) -> None:
    """
    Given a run that a script keeps in a variable, with jobs that have not ended
    If the script ends without closing anything
    I expect the process to end, and the jobs to be cancelled.
    """
    text = "run = client.trace_many(['quick', 'slow'])\nprint(next(run).id)\n"
    with script(text, stuck) as child:
        output, errors = child.communicate(timeout=20)
    assert (child.returncode, output, errors) == (0, "0\n", "")
    with stuck.changed:
        assert stuck.changed.wait_for(lambda: "s0-1" in stuck.cancelled, 5)


def test_ctrl_c_during_a_call_cancels_its_job(stuck: FakeServer) -> None:
    with script("client.trace('slow')\n", stuck) as child:
        with stuck.changed:
            assert stuck.changed.wait_for(lambda: stuck.submissions, 20)
        interrupted = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
        took = time.monotonic() - interrupted
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert took < 5
    with stuck.changed:
        assert stuck.changed.wait_for(lambda: "s0-0" in stuck.cancelled, 5)


def test_a_process_does_not_wait_for_a_server_that_is_away(stuck: FakeServer) -> None:
    text = "run = client.trace_many(['quick', 'slow'])\nprint(next(run).id, flush=True)\ninput()\n"
    child = subprocess.Popen(
        [sys.executable, "-c", START + text, stuck.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "0\n"
        stuck.stop()
        ended = time.monotonic()
        child.communicate("\n", timeout=20)
        assert time.monotonic() - ended < 5
    finally:
        child.kill()
        child.wait()
