"""`reltrace up` while its parts are killed."""

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import reltrace
from e2e.conftest import Process, address_in

SEED = 24
KILLS = 20
PARTS = ("reltrace_scheduler", "reltrace_worker", "redis-server")


def parts_of(service: Process) -> dict[str, psutil.Process]:
    """The processes of a service that live, by what they are."""
    found = {}
    for process in psutil.Process(service.popen.pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        found |= {part: process for part in PARTS if f"-m {part}" in line or part in line[:200]}
    return found


@pytest.mark.slow
def test_kills_of_parts_cost_no_client_its_answer(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    """
    Given a client in a loop, and a random part of the service that is killed every 1 to 4 seconds
    I expect each call to be answered, without an error.
    """
    service = start("reltrace", "up", "--port", "0", "--data", str(tmp_path / "data"))
    address = address_in(service.first_line())
    draw, over, killed = random.Random(SEED), threading.Event(), []

    def kill() -> None:
        for _ in range(KILLS):
            over.wait(draw.uniform(1, 4))
            parts = parts_of(service)
            if parts:
                name = draw.choice(sorted(parts))
                killed.append(name)
                parts[name].send_signal(signal.SIGKILL)
        over.set()

    killer = threading.Thread(target=kill)
    killer.start()
    answers = 0
    with reltrace.Client(address, retry_timeout=120) as client:
        while not over.is_set() or not answers:
            assert client.trace("I have 5 cats", timeout=180).tokens
            answers += 1
    killer.join()
    assert set(killed) == set(PARTS)
    assert service.popen.poll() is None, service.errors.read_text()
