"""What a run allocates at its peak, as torch counts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reltrace_worker.models.loading import LoadedModel

# Kineto announces every start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(loaded: LoadedModel, run: Callable[[], object]) -> int:
    """Return the most bytes that `run` has allocated at a time, beyond what was there before."""
    if loaded.device.type == "cuda":
        return _peak_on_cuda(run, (loaded.device,))
    return _peak_on_cpu(run)


def _peak_on_cpu(run: Callable[[], object]) -> int:
    from torch.autograd.profiler import profile

    with profile(profile_memory=True, use_kineto=True) as profiler:
        run()
    results: Any = profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    return most


def _peak_on_cuda(run: Callable[[], object], devices: Sequence[torch.device]) -> int:
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(torch.cuda.memory_allocated(device) for device in devices)
    run()
    for device in devices:
        torch.cuda.synchronize(device)
    return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before
