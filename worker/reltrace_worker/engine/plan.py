"""Whether a pass may be tried: by what was measured of passes, and the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from reltrace_worker.engine.atlas import Slice
from reltrace_worker.engine.budget import Budget, in_gib
from reltrace_worker.engine.memory import MemoryModel, measure
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
        Runs a pass by a rule over one prompt of so many tokens, with or without checkpointing.
    memory_bytes
        Bytes that a pass may use; None: what is free on CUDA, half of what is free on a CPU.
    always
        Measure before the first pass.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        probe: Callable[[str, int, bool], object],
        memory_bytes: int | None,
        *,
        always: bool,
    ) -> None:
        self._loaded = loaded
        self._probe = probe
        self._budget = Budget(loaded, memory_bytes)
        self._always = always
        self._measured: dict[str, MemoryModel] = {}

    @property
    def available(self) -> int:
        """Bytes that a pass may use now."""
        return self._budget.available()

    def measure(self, rule: str) -> MemoryModel:
        """Measure what passes by a rule need, once; from then on passes are planned."""
        found = self._measured.get(rule)
        if found is None:
            found = measure(self._loaded, partial(self._probe, rule))
            self._measured[rule] = found
        return found

    def prepare(self, rule: str) -> None:
        """Measure passes by a rule, where passes are planned."""
        if self._always or self._measured:
            self.measure(rule)

    def fits(self, jobs: Sequence[PreparedJob], checkpointing: bool) -> bool:
        """Whether a pass over jobs may be tried."""
        measured = self._measured.get(jobs[0].rule)
        return measured is None or measured.need(jobs, checkpointing) <= self.available

    def too_large(self, jobs: Sequence[PreparedJob]) -> EngineError:
        """Return what is said of a pass that fits in no way."""
        tokens = sum(len(job.token_ids) for job in jobs)
        what = "one prompt" if len(jobs) == 1 else f"a pass of {len(jobs)} prompts"
        return self._beyond(
            f"{what} of {tokens} tokens does not fit into memory, even with checkpointing",
            self.measure(jobs[0].rule).need(jobs, checkpointing=True),
        )

    def fault_of_texts(self, jobs: Sequence[PreparedJob]) -> EngineError | None:
        """Return why jobs can not be written together; None: that may be tried."""
        # One alone may be tried on CUDA, where running out of memory is harmless.
        if not self._measured or (len(jobs) == 1 and self._loaded.device.type == "cuda"):
            return None
        # No rule is applied: one's passes, without their backward, are as good as another's.
        need = next(iter(self._measured.values())).need_to_write(jobs)
        if need <= self.available:
            return None
        most = max(job.extent for job in jobs)
        what = f"writing up to {most} tokens, prompts included, does not fit into memory"
        return self._beyond(what, need)

    def fault_of_atlas(self, k: int) -> EngineError | None:
        """Return why the tables of an atlas can not be; None: they can."""
        need = Slice.size(self._loaded.shape, k)
        if not self._measured or need <= self.available:
            return None
        return self._beyond(f"an atlas of {k} places does not fit into memory", need)

    def _beyond(self, what: str, need: int) -> EngineError:
        available = self.available
        return EngineError(
            f"{what}: it needs {need} bytes ({in_gib(need)}) and {available} "
            f"({in_gib(available)}) are available"
        )
