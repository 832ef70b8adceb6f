"""Whether a pass may be tried: by what it needs, and the memory there is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from reltrace_worker.engine.atlas import Slice
from reltrace_worker.engine.budget import GIB, free_bytes, free_host_bytes
from reltrace_worker.engine.memory import MemoryModel
from reltrace_worker.lrp import RULES, Rule
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import GenerateJob, TraceJob

_FRESH = 0.5
"""Seconds for which a reading of host memory counts: three files, a good part of a short pass."""


class Planner:
    """Plans passes by `MemoryModel`.

    Parameters
    ----------
    loaded
        The model.
    limit
        Bytes that a pass may use; None: what is free on CUDA, half of what is free now on a CPU,
        where others live too.
    rules
        Of the engine.
    """

    def __init__(
        self, loaded: LoadedModel, limit: int | None, rules: Mapping[str, Rule] = RULES
    ) -> None:
        self._loaded = loaded
        self._memory = MemoryModel(loaded, rules)
        self._on_cpu = loaded.device.type != "cuda"
        self._limit = free_host_bytes() // 2 if limit is None and self._on_cpu else limit
        self._read_at, self._host = -math.inf, 0

    @property
    def available(self) -> int:
        """Bytes of the model's devices that a pass may use now."""
        free = self._free_on_host() if self._on_cpu else free_bytes(self._loaded.devices)
        return free if self._limit is None else min(free, self._limit)

    def _free_on_host(self) -> int:
        now = time.monotonic()
        if now - self._read_at > _FRESH:
            self._host, self._read_at = free_host_bytes(), now
        return self._host

    def tokens(self, rule: str, checkpointing: bool) -> int:
        """Return how many tokens fit into a pass that asks for no more than ``resid``."""
        return self.available // self._memory.per_token(rule, checkpointing)

    def need(self, jobs: Sequence[TraceJob], checkpointing: bool) -> int:
        """Return the bytes that a pass needs: on a CPU with its results, which lie there too."""
        results = self._memory.results(jobs) if self._on_cpu else 0
        return self._memory.need(jobs, checkpointing) + results

    def fits(
        self, jobs: Sequence[TraceJob], checkpointing: bool, *, try_anyway: bool = False
    ) -> bool:
        """Whether a pass over jobs may be tried; `try_anyway`: whatever it needs of a GPU.

        Running out of memory is harmless on CUDA, where the plan's margin may be too wide; a
        CPU's memory is promised first and missing later, which takes the process down.
        """
        if not self._on_cpu and self._memory.results(jobs) > self._free_on_host():
            return False
        if try_anyway and not self._on_cpu:
            return True
        return self.need(jobs, checkpointing) <= self.available

    def too_large(self, jobs: Sequence[TraceJob]) -> EngineError:
        """Return what is said of a pass that fits in no way."""
        tokens = sum(len(job.token_ids) for job in jobs)
        what = "one prompt" if len(jobs) == 1 else f"a pass of {len(jobs)} prompts"
        what = f"{what} of {tokens} tokens does not fit into memory, even with checkpointing"
        results, host = self._memory.results(jobs), self._free_on_host()
        if not self._on_cpu and results > host:
            return _beyond(f"{what}: its results lie in the host's", results, host)
        return _beyond(what, self.need(jobs, checkpointing=True), self.available)

    def fault_of_texts(self, jobs: Sequence[GenerateJob]) -> EngineError | None:
        """Return why jobs can not be written together; None: that may be tried."""
        need = self._memory.need_to_write(jobs)
        if need <= self.available or (len(jobs) == 1 and not self._on_cpu):
            return None
        most = max(job.total_tokens for job in jobs)
        what = f"writing up to {most} tokens, prompts included, does not fit into memory"
        return _beyond(what, need, self.available)

    def fault_of_atlas(self, k: int) -> EngineError | None:
        """Return why the tables of an atlas can not be; None: they can."""
        need = Slice.size(self._loaded.shape, k)
        if need <= self.available:
            return None
        return _beyond(f"an atlas of {k} places does not fit into memory", need, self.available)


def _beyond(what: str, need: int, available: int) -> EngineError:
    return EngineError(
        f"{what}: it needs {need} bytes ({need / GIB:.3g} GiB) and {available} "
        f"({available / GIB:.3g} GiB) are available"
    )
