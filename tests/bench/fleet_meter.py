"""Reads what processes and Redis have used, and what lies between two readings."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import redis

_MIB = 1 << 20
_COUNTED = (
    "total_commands_processed",
    "total_net_input_bytes",
    "total_net_output_bytes",
    "used_memory_peak",
)


@dataclass(frozen=True)
class Reading:
    """What was used since the start.

    Parameters
    ----------
    at : float
        Seconds of the monotonic clock.
    cpu : mapping
        Seconds of processor time by process.
    rss : mapping
        Bytes by process.
    commands, bytes_in, bytes_out, memory_peak : int
        Of Redis: of all its nodes together, as what follows.
    calls, microseconds : mapping
        Of each Redis command, those that scripts call among them.
    """

    at: float
    cpu: Mapping[str, float]
    rss: Mapping[str, int]
    commands: int
    bytes_in: int
    bytes_out: int
    memory_peak: int
    calls: Mapping[str, int]
    microseconds: Mapping[str, int]


class Meter:
    """Reads the same processes, and Redis, again and again.

    Parameters
    ----------
    processes : mapping of str to sequence of int
        Process ids by name; those of one name are added up.
    stores : sequence of redis.Redis
        Nodes that `INFO` is asked of. The asking itself is in the figures: two commands per
        reading and node.
    """

    def __init__(
        self, processes: Mapping[str, Sequence[int]], stores: Sequence[redis.Redis]
    ) -> None:
        self._processes = {
            name: [psutil.Process(pid) for pid in pids] for name, pids in processes.items()
        }
        self._stores = stores

    def read(self) -> Reading:
        info: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        microseconds: Counter[str] = Counter()
        for store in self._stores:
            said = store.info()
            info.update({name: said[name] for name in _COUNTED})
            for name, row in store.info("commandstats").items():
                command = name.removeprefix("cmdstat_")
                if command != "info":
                    calls[command] += row["calls"]
                    microseconds[command] += row["usec"]
        return Reading(
            at=time.monotonic(),
            cpu={name: sum(map(_cpu, group)) for name, group in self._processes.items()},
            rss={
                name: sum(process.memory_info().rss for process in group)
                for name, group in self._processes.items()
            },
            commands=info["total_commands_processed"],
            bytes_in=info["total_net_input_bytes"],
            bytes_out=info["total_net_output_bytes"],
            memory_peak=info["used_memory_peak"],
            calls=calls,
            microseconds=microseconds,
        )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    # Redis rewrites its file in a child.
    return times.user + times.system + times.children_user + times.children_system


def per_job(before: Reading, after: Reading, jobs: int) -> dict[str, Any]:
    """Return what each job cost."""
    wall = after.at - before.at
    used = {name: after.cpu[name] - before.cpu[name] for name in after.cpu}
    return {
        "cpu_microseconds_per_job": {
            name: round(1e6 * seconds / jobs, 1) for name, seconds in used.items()
        },
        "cpu_percent_of_a_core": {
            name: round(100 * seconds / wall, 1) for name, seconds in used.items()
        },
        "redis": {
            "commands_per_job": round((after.commands - before.commands) / jobs, 2),
            "bytes_in_per_job": round((after.bytes_in - before.bytes_in) / jobs),
            "bytes_out_per_job": round((after.bytes_out - before.bytes_out) / jobs),
            "memory_peak_mib": round(after.memory_peak / _MIB, 1),
            "top_commands_per_job": _top(before, after, jobs),
        },
    }


def per_second(before: Reading, after: Reading) -> dict[str, Any]:
    """Return what a second cost."""
    wall = after.at - before.at
    return {
        "seconds": round(wall, 1),
        "cpu_percent_of_a_core": {
            name: round(100 * (after.cpu[name] - before.cpu[name]) / wall, 1) for name in after.cpu
        },
        "redis": {
            "commands_per_second": round((after.commands - before.commands) / wall),
            "bytes_in_per_second": round((after.bytes_in - before.bytes_in) / wall),
            "bytes_out_per_second": round((after.bytes_out - before.bytes_out) / wall),
            "top_commands_per_second": _top(before, after, wall),
        },
    }


def _top(before: Reading, after: Reading, by: float, count: int = 10) -> dict[str, Any]:
    """Return the commands that took most time: a script's time holds that of its commands."""
    took = {
        name: after.microseconds[name] - before.microseconds.get(name, 0) for name in after.calls
    }
    return {
        name: {
            "calls": round((after.calls[name] - before.calls.get(name, 0)) / by, 3),
            "microseconds": round(took[name] / by, 2),
        }
        for name in sorted(took, key=took.__getitem__, reverse=True)[:count]
    }


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Tell how evenly something is spread over workers; Jain's index is 1 where all have the same.

    R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness and discrimination", 1984.
    """
    total, squares = sum(values), sum(value * value for value in values)
    mean = total / len(values)
    return {
        "least": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "most": round(max(values), digits),
        "coefficient_of_variation": round(statistics.pstdev(values) / mean, 3) if total else 0.0,
        "jain": round(total * total / (len(values) * squares), 4) if total else 1.0,
    }
