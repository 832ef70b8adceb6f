"""One model in several processes: the first one leads, the others follow its passes.

All decisions are the leader's: what goes into a pass, what fits into memory, what is cancelled. It
sends each pass to the followers (`Commands`) and all run it, meeting in the collective operations
of `reltrace_worker.models.sharding`. Followers keep no results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import count
from typing import Any, Protocol

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.engine import Engine
from reltrace_worker.engine.generation import Generation
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.passes import PassTimer
from reltrace_worker.engine.targets import Scalar
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import (
    Edit,
    GenerateJob,
    Sampling,
    Target,
    Term,
    TokenizedPrompt,
    TraceJob,
)

Command = Mapping[str, Any]
"""Values of JSON."""


class Commands(Protocol):
    """The way from the leader to its followers."""

    def send(self, command: Command) -> None:
        """Send a command, or an answer that the one under way waits for."""

    def under_way(self, command: Command) -> AbstractContextManager[None]:
        """Send a command, and wait at the end of the block until all have done it.

        Raises `DeviceLostError`: they have not.
        """


class LeadingEngine(Engine):
    """An engine whose passes followers run too."""

    def __init__(self, *arguments: Any, commands: Commands, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._commands = commands
        self._numbers = count()

    def _trace(
        self, batch: PackedBatch, hooks: SiteHooks, timer: PassTimer, checkpointing: bool
    ) -> list[Scalar]:
        # Followers record nothing: what fails here must not leave them alone in the pass.
        failures: list[Exception] = []
        record = hooks.record

        def recording(*arguments: Any) -> None:
            if not failures:
                try:
                    record(*arguments)
                except Exception as error:
                    failures.append(error)

        command = {
            "trace": [asdict(replace(job, prompt=_ids_of(job))) for job in batch.jobs],
            "layers": {site: sorted(layers) for site, layers in hooks.layers.items()},
            "checkpointing": checkpointing,
        }
        vars(hooks)["record"] = recording
        with self._commands.under_way(command):
            scalars = super()._trace(batch, hooks, timer, checkpointing)
        for failure in failures:
            raise failure
        return scalars

    def _generation(self, jobs: Sequence[GenerateJob]) -> Generation:
        generation = _LedGeneration(self._loaded, jobs, self._fault, next(self._numbers))
        begun = [asdict(replace(job, prompt=_ids_of(job))) for job in jobs]
        with self._commands.under_way({"begin": generation.number, "jobs": begun}):
            return generation

    def _fault(self, jobs: Sequence[GenerateJob]) -> EngineError | None:
        fault = self._memory.generation_fault(jobs)
        self._commands.send({"fault": None if fault is None else str(fault)})
        return fault

    def _decode(
        self, generation: Generation, steps: int, on_token: Callable[[], None] | None
    ) -> None:
        assert isinstance(generation, _LedGeneration)
        cancelled = generation.take_cancelled()
        command = {"decode": generation.number, "steps": steps, "cancelled": cancelled}
        with self._commands.under_way(command):
            super()._decode(generation, steps, on_token)


class _LedGeneration(Generation):
    """A generation whose jobs are cancelled between two calls of `decode`, in all processes."""

    def __init__(self, *arguments: Any) -> None:
        *others, self.number = arguments
        super().__init__(*others)
        self._cancelled: deque[int] = deque()

    def cancel(self, job: int) -> None:
        self._cancelled.append(job)

    def take_cancelled(self) -> list[int]:
        """Cancel what is to be cancelled; return it."""
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        for job in cancelled:
            super().cancel(job)
        return cancelled


class Follower(Engine):
    """Runs the passes of a leading engine on this process's part of the model."""

    def __init__(self, *arguments: Any, receive: Callable[[], Command], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receive = receive
        self._generations: dict[int, Generation] = {}

    def do(self, command: Command) -> None:
        """Run a command. What it raises, the leader's pass raises too, unless memory ran out."""
        with self._exclusive():
            if "trace" in command:
                batch = PackedBatch.of([_trace_job(job) for job in command["trace"]])
                hooks = _NoRecord(
                    self._loaded, {site: frozenset(n) for site, n in command["layers"].items()}
                )
                timer = PassTimer(self._loaded.device)
                self._trace(batch, hooks, timer, command["checkpointing"])
            elif "begin" in command:
                jobs = [_generate_job(job) for job in command["jobs"]]
                self._generations[command["begin"]] = Generation(self._loaded, jobs, self._fault)
            else:
                self._advance_generation(command)

    def _advance_generation(self, command: Command) -> None:
        generation = self._generations.pop(command["decode"])
        for job in command["cancelled"]:
            generation.cancel(job)
        self._decode(generation, command["steps"], None)
        generation.take_outcomes()
        if not generation.finished:
            self._generations[command["decode"]] = generation

    def _fault(self, _: Sequence[GenerateJob]) -> EngineError | None:
        fault = self._receive()["fault"]
        return None if fault is None else EngineError(fault)


class _NoRecord(SiteHooks):
    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Followers keep no results."""


def _ids_of(job: TraceJob | GenerateJob) -> TokenizedPrompt:
    return TokenizedPrompt(job.token_ids, ())


def _prompt(value: Command) -> TokenizedPrompt:
    return TokenizedPrompt(tuple(value["token_ids"]), ())


def _edits(values: Sequence[Command]) -> tuple[Edit, ...]:
    listed = ("features", "positions", "direction")
    return tuple(
        Edit(**{**edit, **{name: tuple(edit[name]) for name in listed}}) for edit in values
    )


def _trace_job(value: Command) -> TraceJob:
    targets = tuple(
        Target(**{**target, "terms": tuple(Term(**term) for term in target["terms"])})
        for target in value["targets"]
    )
    prompt, edits = _prompt(value["prompt"]), _edits(value["edits"])
    return TraceJob(**{**value, "prompt": prompt, "targets": targets, "edits": edits})


def _generate_job(value: Command) -> GenerateJob:
    sampling = Sampling(**value["sampling"])
    return GenerateJob(_prompt(value["prompt"]), sampling, _edits(value["edits"]))
