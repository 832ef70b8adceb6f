"""Whether a pass may be tried: by what was measured of passes, and the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reltrace_worker.engine.atlas import Slice
from reltrace_worker.engine.memory import Budget, MemoryModel, in_gib, measure
from reltrace_worker.errors import EngineError
from reltrace_worker.jobs import PreparedJob
from reltrace_worker.model.loading import LoadedModel


class Planner:
    """Plans by measurement, once there is one; before, everything may be tried.

    Parameters
    ----------
    loaded
        The model.
    probe
        Runs a pass over one prompt of so many tokens, with or without checkpointing.
    memory_bytes
        Bytes that a pass may use; None: what is free on CUDA, half of what is free on a CPU.
    always
        Measure before the first pass.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        probe: Callable[[int, bool], object],
        memory_bytes: int | None,
        *,
        always: bool,
    ) -> None:
        self._loaded = loaded
        self._probe = probe
        self._budget = Budget(loaded, memory_bytes)
        self._always = always
        self._measured: MemoryModel | None = None

    @property
    def available(self) -> int:
        """Bytes that a pass may use now."""
        return self._budget.available()

    def measure(self) -> MemoryModel:
        """Measure what passes need, once."""
        if self._measured is None:
            self._measured = measure(self._loaded, self._probe)
        return self._measured

    def prepare(self) -> None:
        """Measure, where passes are planned from the first one on."""
        if self._always:
            self.measure()

    def fits(self, jobs: Sequence[PreparedJob], checkpointing: bool) -> bool:
        """Whether a pass over jobs may be tried."""
        if self._measured is None:
            return True
        return self._measured.need(jobs, checkpointing) <= self.available

    def too_large(self, jobs: Sequence[PreparedJob]) -> EngineError:
        """Return what is said of a pass that fits in no way."""
        tokens = sum(len(job.token_ids) for job in jobs)
        what = "one prompt" if len(jobs) == 1 else f"a pass of {len(jobs)} prompts"
        return self._beyond(
            f"{what} of {tokens} tokens does not fit into memory, even with checkpointing",
            self.measure().need(jobs, checkpointing=True),
        )

    def fault_of_texts(self, jobs: Sequence[PreparedJob]) -> EngineError | None:
        """Return why jobs can not be written together; None: that may be tried."""
        # One alone may be tried on CUDA, where running out of memory is harmless.
        if self._measured is None or (len(jobs) == 1 and self._loaded.device.type == "cuda"):
            return None
        need = self._measured.need_to_write(jobs)
        if need <= self.available:
            return None
        most = max(job.extent for job in jobs)
        what = f"writing up to {most} tokens, prompts included, does not fit into memory"
        return self._beyond(what, need)

    def fault_of_atlas(self, k: int) -> EngineError | None:
        """Return why the tables of an atlas can not be; None: they can."""
        need = Slice.size(self._loaded.shape, k)
        if self._measured is None or need <= self.available:
            return None
        return self._beyond(f"an atlas of {k} places does not fit into memory", need)

    def _beyond(self, what: str, need: int) -> EngineError:
        available = self.available
        return EngineError(
            f"{what}: it needs {need} bytes ({in_gib(need)}) and {available} "
            f"({in_gib(available)}) are available"
        )
