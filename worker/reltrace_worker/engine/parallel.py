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
from weakref import WeakSet

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.decoding import GeneratedSequence
from reltrace_worker.engine.engine import Engine
from reltrace_worker.engine.generation import Fault, Generation
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.passes import PassTimer
from reltrace_worker.engine.targets import Scalar
from reltrace_worker.lrp.linear import through_onednn
from reltrace_worker.models.loading import LoadedModel
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
        # Followers forget the others.
        self._generations: WeakSet[_LedGeneration] = WeakSet()

    def _under_way(self, command: Command) -> AbstractContextManager[None]:
        alive = [generation.number for generation in self._generations]
        return self._commands.under_way({**command, "generations": alive})

    def _trace(
        self, batch: PackedBatch, hooks: SiteHooks, timer: PassTimer, checkpointing: bool
    ) -> list[Scalar]:
        # Followers record nothing: what fails here must not leave them alone in the pass.
        failures: list[Exception] = []
        record, should_stop = hooks.record, self.should_stop

        def recording(*arguments: Any) -> None:
            if not failures:
                try:
                    record(*arguments)
                except Exception as error:
                    failures.append(error)

        def telling() -> bool:
            stop = should_stop()
            self._commands.send({"answer": stop})
            return stop

        command = {
            "trace": [_without_text(job) for job in batch.jobs],
            "layers": {site: sorted(layers) for site, layers in hooks.layers.items()},
            "checkpointing": checkpointing,
        }
        vars(hooks)["record"], self.should_stop = recording, telling
        try:
            with self._under_way(command):
                scalars = super()._trace(batch, hooks, timer, checkpointing)
        finally:
            self.should_stop = should_stop
        for failure in failures:
            raise failure
        return scalars

    def _generation(self, jobs: Sequence[GenerateJob]) -> Generation:
        generation = _LedGeneration(
            self._loaded, jobs, self._memory.generation_fault, next(self._numbers)
        )
        generation.commands, generation.under_way = self._commands, self._under_way
        self._generations.add(generation)
        return generation


class _LedGeneration(Generation):
    """A generation whose steps followers take too.

    Jobs join and are cancelled between two steps, in all processes.
    """

    commands: Commands
    under_way: Callable[[Command], AbstractContextManager[None]]

    def __init__(
        self, loaded: LoadedModel, jobs: Sequence[GenerateJob], fault: Fault, number: int
    ) -> None:
        super().__init__(loaded, jobs, fault)
        self.number = number
        self._joining = list(jobs)
        self._cancelled: deque[tuple[int, GeneratedSequence]] = deque()

    def join(self, job: GenerateJob) -> int | None:
        number = super().join(job)
        if number is not None:
            self._joining.append(job)
        return number

    def cancel(self, job: int) -> None:
        # On another thread, in the middle of a step.
        if (sequence := self._open.pop(job, None)) is not None:
            self._cancelled.append((job, sequence))

    def _step(self) -> None:
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        for _, sequence in cancelled:
            sequence.stopped = True
        joining, self._joining = self._joining, []
        command = {
            "step": self.number,
            "joined": [_without_text(job) for job in joining],
            "cancelled": [job for job, _ in cancelled],
        }
        decide = self._fault

        def telling(jobs: Sequence[GenerateJob], held: int) -> EngineError | None:
            fault = decide(jobs, held)
            self.commands.send({"answer": None if fault is None else str(fault)})
            return fault

        self._fault = telling
        try:
            with self.under_way(command):
                super()._step()
        finally:
            self._fault = decide


class Follower(Engine):
    """Runs the passes of a leading engine on this process's part of the model."""

    def __init__(self, *arguments: Any, receive: Callable[[], Command], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receive = receive
        self._followed: dict[int, Generation] = {}
        self._joining = False
        self.should_stop = lambda: bool(self._receive()["answer"])

    def do(self, command: Command) -> None:
        """Run a command. What it raises, the leader's pass raises too, unless memory ran out."""
        for number in self._followed.keys() - set(command["generations"]):
            del self._followed[number]
        with self._exclusive():
            if "step" in command:
                self._take_step(command)
                return
            batch = PackedBatch.of([_trace_job(job) for job in command["trace"]])
            layers = {site: frozenset(wanted) for site, wanted in command["layers"].items()}
            timer = PassTimer(self._loaded.device)
            self._trace(batch, _NoRecord(self._loaded, layers), timer, command["checkpointing"])

    def _take_step(self, command: Command) -> None:
        jobs = [_generate_job(job) for job in command["joined"]]
        generation = self._followed.get(command["step"])
        if generation is None:
            generation = Generation(self._loaded, jobs, self._fault)
            self._followed[command["step"]] = generation
        else:
            self._joining = True
            for job in jobs:
                generation.join(job)
            self._joining = False
        for number in command["cancelled"]:
            generation.cancel(number)
        with through_onednn(self._linears):
            generation._step()
        generation.take_outcomes()

    def _fault(self, _: Sequence[GenerateJob], __: int) -> EngineError | None:
        # What has joined had room.
        fault = None if self._joining else self._receive()["answer"]
        return None if fault is None else EngineError(fault)


class _NoRecord(SiteHooks):
    def record(self, site: str, layer: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Followers keep no results."""


def _without_text(job: TraceJob | GenerateJob) -> Command:
    return asdict(replace(job, prompt=TokenizedPrompt(job.token_ids, ())))


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
