"""A fleet on one machine: one Redis, several schedulers, hundreds of simulated workers.

Redis and the schedulers are the real ones, as processes. A worker is the real session over a
connection of its own, with a clock for an engine: many of them share a process. Clients submit by
the bare stubs, and every job id must be answered exactly once. Three scenes:

- idle: all workers are connected and nothing is queued: what waiting costs;
- throughput: the engines take no time: what the service can do;
- paced: a pass takes a time and a number of jobs: how evenly the workers get work.

Prints one JSON object.

    python tests/bench/fleet.py --workers 500 --schedulers 2 --jobs 100000
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import redis
import reltrace
from bench.fleet_meter import Meter, Reading, per_job, per_second, spread
from bench.fleet_workers import MODEL
from bench.idle_service import process, redis_server
from reltrace_scheduler.store.keys import Keys

HERE = Path(__file__).parent
SCENES = ("idle", "throughput", "paced")


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

    def send(self, request: dict[str, Any]) -> None:
        assert self._running.stdin is not None
        self._running.stdin.write(json.dumps(request) + "\n")
        self._running.stdin.flush()

    def receive(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._deadline.left())
        except queue.Empty:
            self._deadline.left()
            raise
        if not line:
            raise RuntimeError(f"{self._running.args!r} has ended")
        answer: dict[str, Any] = json.loads(line)
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
        url, store = stack.enter_context(redis_server(given.appendfsync))
        self._redis = stack.enter_context(redis.Redis.from_url(url))
        self.addresses: list[str] = []
        processes: dict[str, list[int]] = {"redis": [store]}
        pool = f"?max_connections={given.redis_connections}" if given.redis_connections else ""
        for number in range(given.schedulers):
            address, pid = _scheduler(stack, url + pool)
            self.addresses.append(address)
            processes[f"scheduler_{number}"] = [pid]
        self._groups = [
            start(
                stack, deadline, "fleet_workers.py", "--schedulers", ",".join(self.addresses),
                "--first", share.start, "--workers", len(share),
                "--result-bytes", given.result_bytes,
                *(["--share-connections"] if given.share_connections else []),
            )
            for share in _shares(given.workers, given.worker_processes)
        ]  # fmt: skip
        for group in self._groups:
            group.receive()
        self.meter = Meter(
            processes | {"workers": [group.pid for group in self._groups]}, self._redis
        )

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        for group in self._groups:
            group.send(request)
        return [group.receive() for group in self._groups]

    def connect(self) -> tuple[float, float]:
        """Start all sessions; return the seconds until all were entered, and until that was known.

        A scheduler leases by its count of the workers, which is a second old.
        """
        began = time.monotonic()
        self._ask({"do": "connect"})
        while self._redis.zcard(Keys().workers) < self.given.workers:
            self.deadline.left()
            time.sleep(0.02)
        entered = time.monotonic() - began
        for address in self.addresses:
            with reltrace.Client(address) as client:
                while sum(model.workers for model in client.models()) < self.given.workers:
                    self.deadline.left()
                    time.sleep(0.02)
        return entered, time.monotonic() - began

    def pace(self, seconds: float, jobs: int) -> None:
        self._ask({"do": "pace", "seconds": seconds, "jobs": jobs})

    def done(self) -> list[dict[str, float]]:
        """Return what each worker has done since the start."""
        return [one for answer in self._ask({"do": "report"}) for one in answer["workers"]]

    def traffic(self) -> dict[str, int]:
        """Return the workers' connections, and the bytes over them since they were made."""
        answers = self._ask({"do": "report"})
        return {name: sum(a[name] for a in answers) for name in ("connections", "sent", "received")}


def _scheduler(stack: ExitStack, url: str) -> tuple[str, int]:
    running = stack.enter_context(
        process(
            [sys.executable, "-m", "reltrace_scheduler", "--redis", url,
             "--listen", "127.0.0.1:0", "--log-level", "warning",
             "--max-jobs", "1000000", "--tenant-max-jobs", "1000000"],
            stdout=subprocess.PIPE,
        )
    )  # fmt: skip
    assert running.stdout is not None
    line = running.stdout.readline()
    return next(word for word in line.split() if word.startswith("127.0.0.1:")), running.pid


def _shares(count: int, parts: int) -> list[range]:
    parts = min(parts, count)
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


def connected(fleet: Fleet) -> dict[str, Any]:
    """Connect all workers; how long that takes, and what it costs the schedulers."""
    before = fleet.meter.read()
    entered, known = fleet.connect()
    after = fleet.meter.read()
    grown = _schedulers_rss(after) - _schedulers_rss(before)
    return {
        "seconds": round(entered, 2),
        "seconds_until_known": round(known, 2),
        "connections": fleet.traffic()["connections"],
        "scheduler_kib_per_worker": round(grown / 1024 / fleet.given.workers, 1),
    }


def idle(fleet: Fleet) -> dict[str, Any]:
    """Let all workers wait for a while; what is measured is the while."""
    traffic, before = fleet.traffic(), fleet.meter.read()
    time.sleep(min(fleet.given.idle_seconds, fleet.deadline.left()))
    after, traffic_after = fleet.meter.read(), fleet.traffic()
    wall = after.at - before.at
    workers = fleet.given.workers
    # Nothing else adds to a sorted set while nothing is queued.
    beats = after.calls.get("zadd", 0) - before.calls.get("zadd", 0)
    return per_second(before, after) | {
        "heartbeats_per_second": round(beats / wall, 1),
        "bytes_per_second_per_worker": {
            way: round((traffic_after[way] - traffic[way]) / wall / workers, 1)
            for way in ("sent", "received")
        },
        "scheduler_mib": round(_schedulers_rss(after) / (1 << 20), 1),
    }


def _schedulers_rss(reading: Reading) -> int:
    return sum(size for name, size in reading.rss.items() if name.startswith("scheduler"))


def scene(fleet: Fleet, jobs: int, seconds: float, most: int, in_flight: int) -> dict[str, Any]:
    """Bring jobs through engines that take `seconds` for a pass of up to `most` jobs."""
    given = fleet.given
    fleet.pace(seconds, most)
    with ExitStack() as stack:
        clients = [
            start(
                stack, fleet.deadline, "fleet_clients.py", "--model", MODEL,
                # Over the schedulers by turns.
                "--scheduler", fleet.addresses[number % len(fleet.addresses)],
                "--jobs", len(share), "--in-flight", in_flight // given.clients,
                "--batch", given.batch, "--priority", given.priority,
                "--timeout", fleet.deadline.left(),
            )
            for number, share in enumerate(_shares(jobs, given.clients))
        ]  # fmt: skip
        _until("ready", clients)
        at_first, before = fleet.done(), fleet.meter.read()
        for client in clients:
            client.send({})
        # The middle: after every client's start, before the queue runs dry.
        events = _until("warm", clients)
        middle, middle_began = fleet.done(), time.monotonic()
        dry = any(event["event"] == "submitted" for event in events)
        if not dry:
            _until("submitted", clients)
        middle_end, middle_ended = fleet.done(), time.monotonic()
        tallies = _until("done", clients)
        after, at_last = fleet.meter.read(), fleet.done()
    wall = after.at - before.at
    report = {
        "jobs": jobs,
        "seconds": round(wall, 1),
        "jobs_per_second": round(jobs / wall),
        "in_flight": in_flight,
        **_tally(tallies, jobs),
        **per_job(before, after, jobs),
        "all": _evenness(at_first, at_last, wall, seconds, most),
    }
    if not dry:
        report["middle"] = _evenness(middle, middle_end, middle_ended - middle_began, seconds, most)
    return report


def _until(event: str, clients: Sequence[Child]) -> list[dict[str, Any]]:
    """Hear all clients until each has told the event; return what they told last, in order."""
    heard = []
    for client in clients:
        while (told := client.receive())["event"] != event:
            heard.append(told)
        heard.append(told)
    return heard


def _tally(tallies: Sequence[dict[str, Any]], jobs: int) -> dict[str, Any]:
    done = [told for told in tallies if told["event"] == "done"]
    total = {
        name: sum(told[name] for told in done)
        for name in (
            "accepted", "answered", "lost", "doubled", "failed", "result_bytes", "cpu_seconds",
        )
    }  # fmt: skip
    assert total["accepted"] == total["answered"] == jobs, total
    assert total["lost"] == total["doubled"] == total["failed"] == 0, total
    return {
        "lost": total["lost"],
        "doubled": total["doubled"],
        "result_bytes_per_job": round(total["result_bytes"] / jobs),
        "client_cpu_microseconds_per_job": round(1e6 * total["cpu_seconds"] / jobs, 1),
    }


def _evenness(
    before: Sequence[dict[str, float]],
    after: Sequence[dict[str, float]],
    wall: float,
    seconds: float,
    most: int,
) -> dict[str, Any]:
    """Compare the workers over an interval."""
    gone = {
        name: [b[name] - a[name] for a, b in zip(before, after, strict=True)]
        for name in ("jobs", "passes", "busy")
    }
    jobs, passes = sum(gone["jobs"]), sum(gone["passes"])
    report: dict[str, Any] = {
        "seconds": round(wall, 1),
        "jobs_per_second": round(jobs / wall),
        "jobs_per_worker": spread(gone["jobs"]),
        "jobs_per_pass": round(jobs / passes, 1) if passes else 0,
    }
    if seconds:
        idle = [100 * (1 - busy / wall) for busy in gone["busy"]]
        report["idle_percent"] = {
            "least": round(min(idle), 1),
            "median": round(statistics.median(idle), 1),
            "most": round(max(idle), 1),
        }
        report["percent_of_capacity"] = round(100 * jobs / (len(after) * wall * most / seconds), 1)
    return report


def measure(given: argparse.Namespace) -> dict[str, Any]:
    deadline = Deadline(given.deadline)
    report: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "workers": given.workers,
        "schedulers": given.schedulers,
        "appendfsync": given.appendfsync,
        "priority": given.priority,
        "connections": "shared" if given.share_connections else "one per worker",
    }
    with ExitStack() as stack:
        fleet = Fleet(given, stack, deadline)
        report["connect"] = connected(fleet)
        if "idle" in given.scenes:
            report["idle"] = idle(fleet)
        if "throughput" in given.scenes:
            in_flight = given.in_flight or 16 * given.workers
            report["throughput"] = scene(fleet, given.jobs, 0.0, 256, in_flight)
        if "paced" in given.scenes:
            in_flight = given.in_flight or given.workers * 8 * given.pass_jobs
            report["paced"] = {
                "pass_seconds": given.pass_seconds,
                "pass_jobs": given.pass_jobs,
                **scene(
                    fleet, given.paced_jobs or given.jobs, given.pass_seconds, given.pass_jobs,
                    in_flight,
                ),
            }  # fmt: skip
        last = fleet.meter.read()
        report["scheduler_mib_at_the_end"] = round(_schedulers_rss(last) / (1 << 20), 1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--worker-processes", type=int, default=4, help="that the workers share")
    parser.add_argument("--schedulers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--paced-jobs", type=int, default=0, help="0: as many as --jobs")
    parser.add_argument("--in-flight", type=int, default=0, help="0: a multiple of the workers")
    parser.add_argument("--batch", type=int, default=256, help="jobs in one submission")
    parser.add_argument("--priority", choices=["interactive", "batch"], default="interactive")
    parser.add_argument("--result-bytes", type=int, default=64)
    parser.add_argument("--pass-seconds", type=float, default=2.0)
    parser.add_argument("--pass-jobs", type=int, default=8)
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--scenes", nargs="*", choices=SCENES, default=SCENES)
    parser.add_argument(
        "--redis-connections",
        type=int,
        default=0,
        help="most connections of a scheduler to Redis; 0: as the scheduler has it",
    )
    parser.add_argument("--share-connections", action="store_true")
    parser.add_argument("--appendfsync", choices=["always", "everysec", "no"], default="everysec")
    parser.add_argument("--deadline", type=float, default=470.0, help="seconds for the whole run")
    given = parser.parse_args()
    # Children inherit it: every worker has a socket, and every scheduler one for each.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = measure(given)
    report["load_after"] = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
