"""Large results through the whole service: MB/s by chunk size, and memory while nobody reads.

One job's result of `--result-mib` goes from a worker session whose engine does nothing through
scheduler, Redis (append-only file) and gRPC into a numpy array of the client. Prints one JSON
object.

    python tests/bench/tensors.py
    python tests/bench/tensors.py --chunk-kib 64 1024 --result-mib 16 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import reltrace
from bench.idle_service import IdleService, idle_service

MIB = 1 << 20
_DEADLINE = 120.0


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _memory(pid: int, field: str) -> float:
    """Return a figure of /proc/PID/status in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no {field}")


def _forget_peak(pid: int) -> float:
    """Let the peak of a process' memory start from its memory now, in MiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _memory(pid, "VmRSS")


def fetch(client: reltrace.Client, model: str, size: int) -> float:
    """Return the seconds from submitting a job to its array."""
    started = time.perf_counter()
    trace = client.trace(input_ids=[1, 2, 3, 4], model=model)
    took = time.perf_counter() - started
    assert trace.relevance.nbytes == size
    return took


def speed(
    service: IdleService, client: reltrace.Client, sizes: list[int], given: argparse.Namespace
) -> dict[str, Any]:
    """Measure every chunk size in turn, `--rounds` times."""
    result = given.result_mib * MIB
    processes = {
        "client": os.getpid(),
        "scheduler": service.scheduler,
        "worker": service.worker,
        "redis": service.store,
    }
    times: dict[int, list[float]] = {size: [] for size in sizes}
    cpu: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for size in sizes:
        fetch(client, f"chunk-{size}", result)
    for _ in range(given.rounds):
        for size in sizes:
            before = {name: cpu_seconds(pid) for name, pid in processes.items()}
            times[size].append(fetch(client, f"chunk-{size}", result))
            cpu[size].append(
                {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}
            )
    return {
        str(size // 1024): {
            "mb_per_second": round(result / 1e6 / statistics.median(times[size])),
            "least": round(result / 1e6 / max(times[size])),
            "most": round(result / 1e6 / min(times[size])),
            "cpu_milliseconds_per_mb": {
                name: round(1e9 * statistics.median(used[name] for used in cpu[size]) / result, 2)
                for name in processes
            },
        }
        for size in sizes
    }


def slow_reader(
    service: IdleService, client: reltrace.Client, model: str, given: argparse.Namespace
) -> dict[str, Any]:
    """Measure memory while results pile up that nobody takes."""
    done = client.status().ended.get("SUCCEEDED", 0)
    before = {pid: _forget_peak(pid) for pid in (os.getpid(), service.scheduler)}
    items = [{"input_ids": [1, 2, 3, 4], "model": model}] * given.results
    # Slow: one result is taken, and then none until the worker has finished all of them.
    results = iter(client.trace_many(items))
    first = next(results)
    assert isinstance(first, reltrace.Trace), first
    end = time.monotonic() + _DEADLINE
    while client.status().ended.get("SUCCEEDED", 0) < done + given.results:
        assert time.monotonic() < end, "the jobs did not end"
        time.sleep(0.1)
    _until_still(os.getpid(), end)
    growth = {pid: _memory(pid, "VmHWM") - rss for pid, rss in before.items()}
    count = 1 + sum(isinstance(result, reltrace.Trace) for result in results)
    assert count == given.results
    return {
        "results": given.results,
        "mib": given.results * given.result_mib,
        "client_growth_mib": round(growth[os.getpid()]),
        "scheduler_growth_mib": round(growth[service.scheduler]),
    }


def _until_still(pid: int, end: float) -> None:
    """Wait until a process' memory has not changed for half a second: it reads no more."""
    last, since = _memory(pid, "VmRSS"), time.monotonic()
    while time.monotonic() - since < 0.5:
        assert time.monotonic() < end, "the client reads without end"
        now = _memory(pid, "VmRSS")
        if abs(now - last) > 1:
            last, since = now, time.monotonic()
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk-kib", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--result-mib", type=int, default=32)
    parser.add_argument("--results", type=int, default=24, help="that pile up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--appendfsync", choices=["always", "everysec", "no"], default="everysec")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    sizes = [1024 * size for size in given.chunk_kib]
    with (
        idle_service(given.appendfsync, given.result_mib * MIB, {*sizes, MIB}) as service,
        reltrace.Client(service.address) as client,
    ):
        report = {
            "cores": len(os.sched_getaffinity(0)),
            "rounds": given.rounds,
            "appendfsync": given.appendfsync,
            "result_mib": given.result_mib,
            "goal_mb_per_second": 500,
            "by_chunk_kib": speed(service, client, sizes, given),
            # In chunks as workers make them.
            "slow_reader": slow_reader(service, client, f"chunk-{MIB}", given),
        }
    report["load_after"] = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
