"""What a caller gives up leaves no job behind on the server."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import reltrace
from e2e.conftest import wait_until
from reltrace_worker.demo import DEMO_MODEL

JOBS = 256

# A run that says when its first result has come.
CHILD = """
import signal
import sys
import numpy as np
import reltrace

# A shell in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
address, model, tokens, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ids = np.random.default_rng(0).integers(10, 200, (jobs, tokens)).tolist()
client = reltrace.Client(address)
for result in client.trace_many([{"input_ids": one} for one in ids], model=model):
    print("a result", flush=True)
"""


def long_items(tokens: int) -> Iterator[dict[str, list[int]]]:
    """More work than the service does while a test runs."""
    for ids in np.random.default_rng(1).integers(10, 200, (JOBS, tokens)).tolist():
        yield {"input_ids": ids}


@pytest.fixture(scope="module")
def tokens(client: reltrace.Client) -> int:
    """The longest prompt of the demo model."""
    return next(model.context_length for model in client.models() if model.name == DEMO_MODEL)


def waiting(client: reltrace.Client) -> int:
    """Return the jobs of the demo model, whichever revision, that are queued or leased."""
    return sum(
        q.queued + q.leased
        for q in client.status().queues
        if q.model.partition("@")[0] == DEMO_MODEL
    )


def cancelled(client: reltrace.Client) -> int:
    ended = {state.lower(): count for state, count in client.status().ended.items()}
    return ended.get("cancelled", 0)


def nothing_is_left(client: reltrace.Client, cancelled_before: int) -> None:
    """Wait until no job is left, for less time than the jobs would take."""
    wait_until(lambda: waiting(client) == 0, "the end of what was left", 10)
    assert cancelled(client) > cancelled_before


def test_a_timeout_leaves_nothing(client: reltrace.Client, tokens: int) -> None:
    before = cancelled(client)
    with pytest.raises(reltrace.DeadlineExceeded, match="timeout of 2 s"):
        list(client.trace_many(long_items(tokens), model=DEMO_MODEL, timeout=2))
    nothing_is_left(client, before)


def test_a_left_loop_leaves_nothing(client: reltrace.Client, tokens: int) -> None:
    before = cancelled(client)
    for result in client.trace_many(long_items(tokens), model=DEMO_MODEL):
        assert isinstance(result, reltrace.Trace)
        break
    nothing_is_left(client, before)


def test_ctrl_c_leaves_nothing(client: reltrace.Client, address: str, tokens: int) -> None:
    before = cancelled(client)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, address, DEMO_MODEL, str(tokens), str(JOBS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "a result\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert child.returncode != 0
    assert "KeyboardInterrupt" in errors
    nothing_is_left(client, before)


def test_a_script_that_ends_inside_a_loop_leaves_nothing(
    client: reltrace.Client, address: str, tokens: int
) -> None:
    """
    Given a script that takes one result of a run, and keeps the rest of it in a variable
    If it comes to its end
    I expect it to end at once, and no job to be left.
    """
    before = cancelled(client)
    script = CHILD.replace("for result in ", "run = ").replace("model=model):", "model=model)")
    script = script.replace("    print(", "next(run)\nprint(")
    subprocess.run(
        [sys.executable, "-c", script, address, DEMO_MODEL, str(tokens), str(JOBS)],
        check=True,
        timeout=60,
    )
    nothing_is_left(client, before)
