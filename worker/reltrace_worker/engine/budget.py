"""How much memory there is on the devices of a model, and what a pass may use of it."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from reltrace_worker.model.loading import LoadedModel

GIB = 1 << 30

_MARGIN = 0.9
"""Share of what is free that a pass may count on: allocators lose some to fragments."""


_FRESH = 0.5
"""Seconds for which a reading of a CPU's free memory counts."""


def devices_of(loaded: LoadedModel) -> list[torch.device]:
    """Return the devices that hold weights of a model."""
    return sorted({p.device for p in loaded.model.parameters()}, key=str)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text().strip())
    except (OSError, ValueError):
        # Not this system, or no limit ("max").
        return None


def _free_on_cpu() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Not Linux: all of the memory, of which the budget takes half.
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A container may have less than its machine.
    limit = _read_number("/sys/fs/cgroup/memory.max")
    used = _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def free_bytes(loaded: LoadedModel) -> int:
    """Return the bytes that a pass could allocate now on the devices of a model."""
    if loaded.device.type != "cuda":
        return _free_on_cpu()
    total = 0
    for device in devices_of(loaded):
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds but does not use is free to us.
        total += free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return total


class Budget:
    """The bytes that a pass may use.

    Parameters
    ----------
    loaded
        The model, whose device is asked.
    limit
        Bytes that a pass may use; None: what is free on CUDA, half of what was free when the
        budget was made on a CPU, where others live too.
    """

    def __init__(self, loaded: LoadedModel, limit: int | None = None) -> None:
        self._loaded = loaded
        if limit is None and loaded.device.type != "cuda":
            limit = free_bytes(loaded) // 2
        self._limit = limit
        self._read_at = -math.inf
        self._free = 0

    def available(self) -> int:
        """Return the bytes that a pass may use now; on a CPU, half a second ago at most."""
        # Three files of the kernel's: a good part of a short prompt's pass.
        now = time.monotonic()
        if self._loaded.device.type == "cuda" or now - self._read_at > _FRESH:
            self._free, self._read_at = free_bytes(self._loaded), now
        free = int(_MARGIN * self._free)
        return free if self._limit is None else min(free, self._limit)


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, in any of the words that torch has."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def release(device: torch.device) -> None:
    """Give back what a pass that broke off has left behind; call it when its error is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_gib(count: float) -> str:
    """Return bytes as text, in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


def device_memory(devices: Sequence[torch.device]) -> dict[str, int]:
    """Return the bytes that torch uses of GPUs, by kind; none on a CPU."""
    found: dict[str, int] = {}
    for device in devices:
        if device.type != "cuda":
            continue
        kinds = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "total": torch.cuda.get_device_properties(device).total_memory,
        }
        for kind, count in kinds.items():
            found[kind] = found.get(kind, 0) + count
    return found
