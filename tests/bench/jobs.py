"""Tiny jobs through the whole service, beside dramatiq, arq and taskiq.

The service is client, gRPC, scheduler, Redis and a worker session whose engine does nothing;
results are stored, fetched, and acknowledged. The others run one task per job that gives a
result as large, with their Redis results, each in its own Redis of the same settings. All sides
have the same two cores and take turns; figures are medians of the rounds, ratios are of
neighbours. Prints one JSON object.

    python tests/bench/jobs.py                                  # without the others
    python tests/bench/jobs.py --rivals .venv/rivals/bin/python # as `make bench` does
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import psutil
import reltrace
from bench import raw_client
from bench.idle_service import IdleService, idle_service
from bench.rivals.driver import LIBRARIES, Rival

CORES = 2


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_seconds(service: IdleService) -> dict[str, float]:
    """Return the processor time that each process has used so far."""
    processes = {
        "client": os.getpid(),
        "scheduler": service.scheduler,
        "worker": service.worker,
        "redis": service.store,
    }
    used = {name: psutil.Process(pid).cpu_times() for name, pid in processes.items()}
    return {name: times.user + times.system for name, times in used.items()}


def through_sdk(client: reltrace.Client, jobs: int) -> None:
    items = [{"input_ids": [1, 2, 3, 4], "model": "tiny"}] * jobs
    count = 0
    for trace in client.trace_many(items, max_in_flight=4096):
        assert isinstance(trace, reltrace.Trace), trace
        count += 1
    assert count == jobs


def round_trips(client: reltrace.Client, count: int) -> dict[str, float]:
    """Milliseconds of one job at a time; the engine takes none of them."""
    times = []
    for index in range(count + 20):
        took = seconds(lambda: client.trace(input_ids=[1, 2, 3, 4], model="tiny"))
        # The first ones warm connections and caches.
        if index >= 20:
            times.append(1000 * took)
    return {
        "median": round(float(np.median(times)), 2),
        "p99": round(float(np.quantile(times, 0.99)), 2),
        "goal_median": 5.0,
        "goal_p99": 20.0,
    }


def rates(jobs: int, times: list[float]) -> dict[str, Any]:
    return {
        "jobs": jobs,
        "per_second": round(jobs / statistics.median(times)),
        "least": round(jobs / max(times)),
        "most": round(jobs / min(times)),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "rounds": given.rounds,
        "appendfsync": given.appendfsync,
        "goal_per_second": 10_000,
    }
    with ExitStack() as stack:
        service = stack.enter_context(idle_service(given.appendfsync))
        client = stack.enter_context(reltrace.Client(service.address))
        rivals = [
            stack.enter_context(Rival(library, given.rivals, given.appendfsync))
            for library in (given.libraries if given.rivals else ())
        ]
        # Warm: connections, scripts, forks of the others' workers.
        through_sdk(client, 300)
        raw_client.through(service.address, 300)
        for rival in rivals:
            rival.run(50)
        sdk, raw = [], []
        others: dict[str, list[dict[str, float]]] = {rival.name: [] for rival in rivals}
        cpu: list[dict[str, float]] = []
        for _ in range(given.rounds):
            before = cpu_seconds(service)
            sdk.append(seconds(lambda: through_sdk(client, given.jobs)))
            after = cpu_seconds(service)
            cpu.append({name: after[name] - before[name] for name in after})
            raw.append(seconds(lambda: raw_client.through(service.address, given.jobs)))
            for rival in rivals:
                others[rival.name].append(rival.run(given.rival_jobs))
        report["sdk"] = rates(given.jobs, sdk) | {
            # What two cores can do at most is 2,000,000 over the sum of these.
            "cpu_microseconds_per_job": {
                name: round(1e6 * statistics.median(used[name] for used in cpu) / given.jobs, 1)
                for name in cpu[0]
            }
        }
        report["raw"] = rates(given.jobs, raw)
        for rival in rivals:
            times = [answer["seconds"] for answer in others[rival.name]]
            ratios = [
                (given.jobs / ours) / (given.rival_jobs / theirs)
                for ours, theirs in zip(sdk, times, strict=True)
            ]
            report[rival.name] = {
                "version": rival.version,
                **rates(given.rival_jobs, times),
                "sdk_is_faster_by": round(statistics.median(ratios), 2),
            }
        report["round_trip_ms"] = round_trips(client, given.round_trips)
        submitted = [
            seconds(lambda: raw_client.submit_only(service.address, given.jobs))
            for _ in range(given.rounds)
        ]
        report["submit_only"] = rates(given.jobs, submitted)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rival-jobs", type=int, default=3_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-trips", type=int, default=300)
    parser.add_argument("--appendfsync", choices=["always", "everysec", "no"], default="everysec")
    parser.add_argument("--rivals", help="interpreter that has tests/bench/requirements.txt")
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES)
    given = parser.parse_args()
    # Children inherit it: all sides have the same cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    report = measure(given)
    report["load_after"] = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
