"""How much memory is free, in the host and on GPUs; and giving freed memory back."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch

GIB = 1 << 30

_MARGIN = 0.9
"""Share of what is free that a pass may count on: allocators lose some to fragments."""

_TRIM_FROM = 256 << 20
"""Bytes of freed memory that the process may keep: below, the next pass would only ask again."""


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text().strip())
    except (OSError, ValueError):
        # Not this system, or no limit ("max").
        return None


def free_host_bytes() -> int:
    """Return the bytes of the host's memory that a pass could allocate now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Not Linux: all of the memory, of which the plan takes half.
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A container may have less than its machine.
    limit = _read_number("/sys/fs/cgroup/memory.max")
    used = _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return int(_MARGIN * free)


def free_device_bytes(devices: Sequence[torch.device]) -> int:
    """Return the bytes of some GPUs that a pass could allocate now."""
    total = 0
    for device in devices:
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds but does not use is free to us.
        total += free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_MARGIN * total)


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, in any of the words that torch has."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def release(device: torch.device) -> None:
    """Give back what a failed pass has left behind; call it when its error is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Trimmer:
    """Gives freed memory of the host back to the system; glibc's allocator keeps most of it."""

    def __init__(self) -> None:
        # None: another C library than glibc.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._resident = 0

    def trim(self) -> None:
        """Trim, if the process has grown since the last time."""
        if self._trim is not None and _resident_bytes() > self._resident + _TRIM_FROM:
            self._trim(0)
            self._resident = _resident_bytes()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
