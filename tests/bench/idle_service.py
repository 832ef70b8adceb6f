"""Redis, a scheduler and the idle worker, as processes; nothing of the model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import reltrace
from reltrace_scheduler.local.binary import find_server

HERE = Path(__file__).parent
_START = 30.0
"""Seconds for a process to come up."""


@dataclass(frozen=True)
class IdleService:
    """A service that is up.

    Parameters
    ----------
    address : str
        The scheduler's.
    scheduler, worker, store : int
        Process ids.
    """

    address: str
    scheduler: int
    worker: int
    store: int


@contextmanager
def process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a process for as long as the block lasts."""
    environment = options.pop("env", os.environ)
    # The developer's own settings must not reach what is measured.
    own = {key: value for key, value in environment.items() if not key.startswith("RELTRACE_")}
    running = subprocess.Popen(command, text=True, env=own, **options)
    with running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


@contextmanager
def redis_server(appendfsync: str) -> Iterator[tuple[str, int]]:
    """Run an empty Redis with an append-only file; gives its URL and process id."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "redis.sock"
        command = [
            str(find_server()), "--port", "0", "--unixsocket", str(socket), "--dir", folder,
            "--appendonly", "yes", "--appendfsync", appendfsync, "--save", "",
            "--maxmemory-policy", "noeviction",
            # As a scheduler's own Redis has them.
            "--auto-aof-rewrite-min-size", "256mb", "--rdbcompression", "no",
        ]  # fmt: skip
        with process(command, stdout=subprocess.DEVNULL) as running:
            _until_it_answers(socket)
            yield f"unix://{socket}", running.pid


def _until_it_answers(socket: Path) -> None:
    end = time.monotonic() + _START
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return


@contextmanager
def scheduler_process(appendfsync: str = "everysec") -> Iterator[tuple[str, int, int]]:
    """Run Redis and a scheduler; gives its address, and the process ids of it and of Redis."""
    with redis_server(appendfsync) as (url, store):
        command = [
            sys.executable, "-m", "reltrace_scheduler", "--redis", url,
            "--listen", "127.0.0.1:0", "--log-level", "warning", "--max-jobs", "1000000",
            "--tenant-max-jobs", "1000000",
        ]  # fmt: skip
        with process(command, stdout=subprocess.PIPE) as scheduler:
            assert scheduler.stdout is not None
            line = scheduler.stdout.readline()
            address = next(word for word in line.split() if word.startswith("127.0.0.1:"))
            yield address, scheduler.pid, store


def until_served(address: str, models: Collection[str]) -> None:
    """Wait until workers serve all of these models."""
    with reltrace.Client(address) as client:
        end = time.monotonic() + _START
        while set(models) - {model.name for model in client.models() if model.workers}:
            assert time.monotonic() < end, "the worker did not come up"
            time.sleep(0.05)


@contextmanager
def idle_service(
    appendfsync: str = "everysec", result_bytes: int = 1 << 20, chunk_bytes: Collection[int] = ()
) -> Iterator[IdleService]:
    """Run the service around the idle worker until the block ends."""
    with ExitStack() as stack:
        address, scheduler, store = stack.enter_context(scheduler_process(appendfsync))
        worker = stack.enter_context(
            process(
                [sys.executable, str(HERE / "idle_worker.py"), "--scheduler", address,
                 "--result-bytes", str(result_bytes),
                 "--chunk-bytes", *map(str, chunk_bytes)],
            )
        )  # fmt: skip
        until_served(address, {"tiny", "parked", *(f"chunk-{size}" for size in chunk_bytes)})
        yield IdleService(address, scheduler, worker.pid, store)
