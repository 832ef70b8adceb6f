"""A machine that sleeps while its results wait on the server."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import reltrace
from e2e.conftest import wait_until

COUNT = 256
PROGRAM = f"""
import logging, sys, reltrace
logging.basicConfig()
prompts = [f"{{n}}" + " I have 5 cats and 3 dogs." * 20 for n in range({COUNT})]
with reltrace.Client(sys.argv[1]) as client:
    for result in client.trace_many(prompts, reduce="full", timeout=200):
        kind = type(result).__name__
        print(result.id, kind, result.job_id if kind == "Trace" else result.error, flush=True)
        if not result.id:
            sys.stdin.readline()
"""


@pytest.mark.slow
def test_results_that_expire_meanwhile_come_again(
    tmp_path: Path, start_demo: Callable[..., str]
) -> None:
    """
    Given many traces, and a client that is stopped until their results have expired
    I expect it to get each result once it goes on, without an error.
    """
    output = tmp_path / "output"
    address = start_demo("--result-ttl", "1")
    with reltrace.Client(address, retry_timeout=100) as watching:
        with output.open("w") as file:
            sleeper = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, address],
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        wait_until(lambda: "\n" in output.read_text(), "the first result", 100)
        sleeper.send_signal(signal.SIGSTOP)
        submission = output.read_text().split()[2].rpartition("-")[0]
        jobs = [f"{submission}-{number}" for number in range(COUNT)]
        wait_until(
            lambda: {job.state for job in watching.jobs(*jobs)} == {None}, "they expire", 120
        )
        sleeper.send_signal(signal.SIGCONT)
        _, errors = sleeper.communicate("\n", timeout=200)
    rows = [line.split(maxsplit=2) for line in output.read_text().splitlines()]
    assert sorted(int(row[0]) for row in rows) == list(range(COUNT))
    assert {row[1] for row in rows} == {"Trace"}
    assert "jobs have expired before they were read; submitted them again" in errors
