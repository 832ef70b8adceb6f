"""A fleet on one machine: Redis, several schedulers, hundreds of simulated workers.

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
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.fleet_meter import Reading, per_job, per_second, spread
from bench.fleet_processes import Child, Deadline, Fleet, shares, start
from bench.fleet_workers import MODEL

SCENES = ("idle", "throughput", "paced")

_SHORTEST_MIDDLE = 4
"""Passes: what is shorter says more of when it was looked at than of the workers."""


def connected(fleet: Fleet) -> dict[str, Any]:
    """Connect all workers; how long that takes, and what it costs the schedulers."""
    before = fleet.meter.read()
    welcomed, known = fleet.connect()
    after = fleet.meter.read()
    grown = _schedulers_rss(after) - _schedulers_rss(before)
    return {
        "seconds": round(welcomed, 2),
        "seconds_until_known": round(known, 2),
        "tcp_connections": fleet.told()["tcp"],
        "scheduler_kib_per_worker": round(grown / 1024 / fleet.given.workers, 1),
    }


def idle(fleet: Fleet) -> dict[str, Any]:
    """Let all workers wait for a while; what is measured is the while."""
    told, before = fleet.told(), fleet.meter.read()
    time.sleep(min(fleet.given.idle_seconds, fleet.deadline.left()))
    after, told_after = fleet.meter.read(), fleet.told()
    wall = after.at - before.at
    gone = {name: told_after[name] - told[name] for name in told}
    return per_second(before, after) | {
        "heartbeats_per_second": round(gone["heartbeats"] / wall, 1),
        "bytes_per_second_per_worker": {
            way: round(gone[way] / wall / fleet.given.workers, 1) for way in ("sent", "received")
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
            for number, share in enumerate(shares(jobs, given.clients))
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
    if not dry and middle_ended - middle_began >= _SHORTEST_MIDDLE * max(seconds, 0.1):
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
        "redis_nodes": given.redis_nodes,
        "shards": given.shards,
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
        told, last = fleet.told(), fleet.meter.read()
        # Over both scenes; more than one per worker: a scheduler cut them off.
        report["connections_made"] = told["connected"]
        report["leases_revoked"] = told["revoked"]
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
    parser.add_argument("--redis-nodes", type=int, default=1, help="several: a Redis Cluster")
    parser.add_argument("--shards", type=int, default=1, help="of the queue, over those nodes")
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
