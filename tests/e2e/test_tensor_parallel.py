"""A worker of two processes, as an operator starts it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reltrace
from e2e.conftest import Process, wait_until
from reference.processes import children, is_alive
from reltrace_worker.session.lifecycle import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"
SITES = ("embed", "resid", "head", "neuron")


@pytest.fixture
def scheduler(start: Callable[..., Process], tmp_path: Path) -> str:
    """The address of a scheduler whose leases are short."""
    process = start(
        "reltrace_scheduler", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"
    )
    return process.first_line().split()[-1]


def start_worker(start: Callable[..., Process], address: str, *options: str) -> Process:
    worker = start(
        "reltrace_worker", "--scheduler", address, "--model", "demo", "--threads", "1", *options
    )
    with reltrace.Client(address, retry_timeout=100) as client:
        wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
    return worker


def test_it_serves_what_one_process_serves(start: Callable[..., Process], scheduler: str) -> None:
    """
    Given a worker in two processes
    If it is asked for a trace and a text, told to stop, and one in one process after it
    I expect the same numbers from both, a result that names the first, and no process left.
    """
    found = []
    for options in (("--tensor-parallel", "2"), ()):
        worker = start_worker(start, scheduler, *options)
        with reltrace.Client(scheduler) as client:
            trace = client.trace(PROMPT, sites=SITES, reduce="full")
            text = client.generate(PROMPT, max_new_tokens=6)
        found.append((trace, text))
        others = children(worker.popen.pid)
        assert len(others) == len(options) // 2
        assert worker.stop() == 0, worker.errors.read_text()
        wait_until(lambda others=others: not any(map(is_alive, others)), "they have ended", 20)
    (ours, our_text), (wanted, wanted_text) = found
    for site in SITES:
        bound = 2e-5 * np.abs(wanted[site]).max()
        np.testing.assert_allclose(ours[site], wanted[site], rtol=0, atol=bound)
    assert our_text.token_ids == wanted_text.token_ids
    assert (ours.provenance.device, wanted.provenance.device) == ("2 x cpu", "cpu")


@pytest.mark.parametrize("who", ["follower", "leader"])
def test_no_process_survives_another(
    start: Callable[..., Process], scheduler: str, who: str
) -> None:
    """
    Given a worker in two processes, without a job
    If one of them is killed
    I expect the other to end too, rank 0 with the code by which it is started again.
    """
    worker = start_worker(start, scheduler, "--tensor-parallel", "2")
    (follower,) = children(worker.popen.pid)
    os.kill(follower if who == "follower" else worker.popen.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(follower), "the follower has ended", 20)
    code = worker.popen.wait(30)
    assert code == (HANGS if who == "follower" else -signal.SIGKILL), worker.errors.read_text()
    if who == "follower":
        assert "rank 1 has ended with code -9" in worker.errors.read_text()
