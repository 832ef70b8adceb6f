"""A real service: real processes, a real Redis, real models."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import reltrace
from reference.checkpoints import GROUPED, LLAMA3_ROPE, TIED, save_checkpoint
from waiting import wait_until

__all__ = ["Process", "address_in", "wait_until"]

START = 120.0
"""Seconds for a service to come up on two busy cores."""


@dataclass
class Process:
    """A command of ours, with what it wrote."""

    popen: subprocess.Popen[str]
    errors: Path

    @classmethod
    def start(cls, folder: Path, module: str, *options: str, **settings: str) -> "Process":
        """Start ``python -m MODULE OPTIONS`` with `settings`, none of this process's own."""
        errors = folder / f"{module}-{time.monotonic_ns()}.err"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RELTRACE_")}
        with errors.open("w") as file:
            popen = subprocess.Popen(
                [sys.executable, "-m", module, *options],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment | settings,
            )
        return cls(popen, errors)

    def first_line(self) -> str:
        """Wait for the line that says it is ready; a process that gives up ends the wait."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, self.errors.read_text()
        return line

    def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for the end in order."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.popen.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start commands that end with the test."""
    processes: list[Process] = []

    def start(module: str, *options: str, **settings: str) -> Process:
        processes.append(Process.start(tmp_path, module, *options, **settings))
        return processes[-1]

    yield start
    for process in reversed(processes):
        process.stop()


@pytest.fixture
def start_demo(tmp_path: Path, start: Callable[..., Process]) -> Callable[..., str]:
    """Start a scheduler with further options and a worker with the demo model; give the address."""

    def start_demo(*options: str) -> str:
        scheduler = start(
            "reltrace_scheduler",
            "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0", *options,
        )  # fmt: skip
        address = scheduler.first_line().split()[-1]
        start("reltrace_worker", "--scheduler", address, "--model", "demo", "--threads", "1")
        with reltrace.Client(address, retry_timeout=100) as client:
            wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
        return address

    return start_demo


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with what LLaMAs differ in."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipes = {"grouped": GROUPED, "tied": TIED, "llama3-rope": LLAMA3_ROPE}
    return {name: save_checkpoint(folder / name, recipe) for name, recipe in recipes.items()}


@pytest.fixture(scope="session")
def address(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Run `reltrace up` with the demo model and the random ones."""
    folder = tmp_path_factory.mktemp("up")
    models = [option for path in checkpoints.values() for option in ("--model", str(path))]
    service = Process.start(
        folder, "reltrace", "up", "--port", "0", "--data", str(folder / "data"),
        "--model", "demo", *models,
    )  # fmt: skip
    yield address_in(service.first_line())
    assert service.stop() == 0, service.errors.read_text()


def address_in(ready: str) -> str:
    """Return the address in the line that `reltrace up` prints."""
    return ready.partition(" ready at ")[2].split()[0]


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[reltrace.Client]:
    with reltrace.Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def demo_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler with a worker that has the demo model."""
    folder = tmp_path_factory.mktemp("demo")
    scheduler = Process.start(
        folder, "reltrace_scheduler", "--data", str(folder / "data"), "--listen", "127.0.0.1:0"
    )
    address = scheduler.first_line().split()[-1]
    worker = Process.start(
        folder, "reltrace_worker", "--scheduler", address, "--model", "demo", "--threads", "1"
    )
    try:
        with reltrace.Client(address, retry_timeout=100) as client:
            wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
        yield address
    finally:
        worker.stop()
        scheduler.stop()
