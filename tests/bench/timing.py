"""Two sides in turns on the same machine, and the ratios of neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], object]) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def in_turns(device: torch.device, rounds: int, *sides: Callable[[], object]) -> list[list[float]]:
    """Seconds of each side, [rounds][sides]; every side has run before, to warm up."""
    return [[timed(device, side) for side in sides] for _ in range(rounds)]


def ratios(times: list[list[float]], over: int, under: int) -> Row:
    found = [row[over] / row[under] for row in times]
    return {
        "median": round(statistics.median(found), 3),
        "least": round(min(found), 3),
        "most": round(max(found), 3),
    }
