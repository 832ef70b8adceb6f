"""The processes of a simulated fleet, and how they are spoken to."""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import redis
import reltrace
from bench.fleet_meter import Meter
from bench.fleet_workers import MODEL
from bench.idle_service import process, redis_server
from redis_cluster import redis_cluster

HERE = Path(__file__).parent


class Deadline:
    """The end of the whole run."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the run has reached its deadline: give it more, or fewer jobs")
        return left


class Child:
    """A process that is spoken to by lines; what it says is JSON."""

    def __init__(self, running: subprocess.Popen[str], deadline: Deadline) -> None:
        self._running = running
        self._deadline = deadline
        self._lines: queue.Queue[str] = queue.Queue()
        self.pid = running.pid
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._running.stdout is not None
        for line in self._running.stdout:
            self._lines.put(line)
        self._lines.put("")

    def line(self) -> str:
        """Wait for the next line, as long as the run may take."""
        try:
            line = self._lines.get(timeout=self._deadline.left())
        except queue.Empty:
            raise TimeoutError(f"{self._running.args!r} said nothing until the deadline") from None
        if not line:
            raise RuntimeError(f"{self._running.args!r} has ended")
        return line

    def send(self, request: dict[str, Any]) -> None:
        assert self._running.stdin is not None
        self._running.stdin.write(json.dumps(request) + "\n")
        self._running.stdin.flush()

    def receive(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.line())
        return answer


def start(stack: ExitStack, deadline: Deadline, script: str, *arguments: object) -> Child:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    running = stack.enter_context(process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    return Child(running, deadline)


class Fleet:
    """Everything that runs; it ends with the stack.

    Parameters
    ----------
    given : argparse.Namespace
        The options.
    """

    def __init__(self, given: argparse.Namespace, stack: ExitStack, deadline: Deadline) -> None:
        self.given = given
        self.deadline = deadline
        stores = _stores(stack, given)
        self.addresses: list[str] = []
        processes: dict[str, list[int]] = {"redis": [pid for _, pid in stores]}
        url, _ = stores[0]
        for number in range(given.schedulers):
            address, pid = _scheduler(stack, deadline, url, given.shards)
            self.addresses.append(address)
            processes[f"scheduler_{number}"] = [pid]
        self._groups = [
            start(
                stack, deadline, "fleet_workers.py", "--schedulers", ",".join(self.addresses),
                "--first", share.start, "--workers", len(share),
                "--result-bytes", given.result_bytes,
                *(["--share-connections"] if given.share_connections else []),
            )
            for share in shares(given.workers, given.worker_processes)
        ]  # fmt: skip
        for group in self._groups:
            group.receive()
        self.meter = Meter(
            processes | {"workers": [group.pid for group in self._groups]},
            [
                stack.enter_context(redis.Redis.from_url(url, socket_timeout=60))
                for url, _ in stores
            ],
        )

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        for group in self._groups:
            group.send(request)
        return [group.receive() for group in self._groups]

    def connect(self) -> tuple[float, float]:
        """Start all sessions; return the seconds until all were welcomed, and until that was known.

        A scheduler leases by its count of the workers, which is a second old.
        """
        began = time.monotonic()
        self._ask({"do": "connect"})
        while self.told()["connected"] < self.given.workers:
            time.sleep(0.02)
        welcomed = time.monotonic() - began
        for address in self.addresses:
            with reltrace.Client(address) as client:
                while _known(client) < self.given.workers:
                    self.deadline.left()
                    time.sleep(0.02)
        return welcomed, time.monotonic() - began

    def pace(self, seconds: float, jobs: int) -> None:
        self._ask({"do": "pace", "seconds": seconds, "jobs": jobs})

    def done(self) -> list[dict[str, float]]:
        """Return what each worker has done since the start."""
        return [one for answer in self._ask({"do": "report"}) for one in answer["workers"]]

    def told(self) -> dict[str, int]:
        """Return what the workers have counted: connections, their bytes, heartbeats."""
        answers = self._ask({"do": "report"})
        return {name: sum(a[name] for a in answers) for name in answers[0] if name != "workers"}


def _known(client: reltrace.Client) -> int:
    return sum(model.workers for model in client.models() if model.name == MODEL)


def _stores(stack: ExitStack, given: argparse.Namespace) -> list[tuple[str, int]]:
    """Start Redis, or the nodes of a Redis Cluster; return URL and process id of each."""
    if given.redis_nodes == 1:
        return [stack.enter_context(redis_server(given.appendfsync))]
    nodes = stack.enter_context(redis_cluster(given.redis_nodes, given.appendfsync))
    return [(node.url, node.pid) for node in nodes]


def _scheduler(stack: ExitStack, deadline: Deadline, url: str, shards: int) -> tuple[str, int]:
    running = stack.enter_context(
        process(
            [sys.executable, "-m", "reltrace_scheduler", "--redis", url,
             "--shards", str(shards), "--listen", "127.0.0.1:0", "--log-level", "warning",
             "--max-jobs", "1000000", "--tenant-max-jobs", "1000000"],
            stdout=subprocess.PIPE,
        )
    )  # fmt: skip
    words = Child(running, deadline).line().split()
    return next(word for word in words if word.startswith("127.0.0.1:")), running.pid


def shares(count: int, parts: int) -> list[range]:
    parts = min(parts, count)
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(first, last) for first, last in pairwise(edges)]
