"""Runs jobs on one loaded model: pure torch, no gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal

import torch
from torch import nn

from reltrace_worker.engine.atlas import Atlas, AtlasRecorder
from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.generation import DECODE_STEPS, Generation
from reltrace_worker.engine.hooks import SiteHooks
from reltrace_worker.engine.host_memory import Trimmer, is_out_of_memory, release
from reltrace_worker.engine.memory import MemoryPlan, head_size
from reltrace_worker.engine.passes import (
    PHASES,
    PassTimer,
    Trace,
    predict,
    trace_checkpointed,
    trace_keeping,
)
from reltrace_worker.engine.recorder import RelevanceRecorder
from reltrace_worker.engine.sites import first_output
from reltrace_worker.engine.targets import Scalar, hints, resolve
from reltrace_worker.lrp import RULES, Rule, apply_rule
from reltrace_worker.lrp.attention import kernel_for
from reltrace_worker.lrp.linear import linear_layers, through_onednn
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import (
    DeviceLostError,
    EngineError,
    InvalidJob,
    NotFiniteError,
    PassFailedError,
)
from reltrace_worker.types.jobs import AtlasJob, GenerateJob, Job, TraceJob
from reltrace_worker.types.results import JobResult, Outcome

Checkpointing = Literal["auto", "on", "off"]

MOST_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Largest token budget per pass: beyond, a pass gets longer and not faster per token."""

_KEEPING_PAYS_FROM = 1024
"""Tokens per pass: with room for so many, passes without checkpointing are the faster ones."""

_USUAL_RULE = "attnlrp"

_TARGETS_PER_RECOMPUTE = 8
"""With checkpointing, so many targets of one prompt share a forward pass and its recomputation:
with more, a pass would last longer, and with fewer, what they share would cost more."""


class Engine:
    """Runs batches of jobs on one loaded model.

    Between calls the model is the one that was loaded. Calls from several threads wait for each
    other. Every call that runs a pass may raise `DeviceLostError`: the device does not work any
    more for this process.

    `checkpointing` is ``"on"``: keep only the input of each segment of layers in the forward and
    recompute the layers in the backward; ``"off"``: keep everything, one forward pass less;
    ``"auto"``: off where the pass fits into memory, else on. The numbers are the same. A pass may
    use `memory_bytes`; None: what is free on CUDA, half of what is free on a CPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        checkpointing: Checkpointing = "auto",
        memory_bytes: int | None = None,
        *,
        rules: Mapping[str, Rule] = RULES,
    ) -> None:
        self._loaded = loaded
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._checkpointing = checkpointing
        self.rules = rules
        self._memory = MemoryPlan(loaded, memory_bytes, rules)
        self._trimmer = Trimmer()
        # Rules patch the model's instances: one pass at a time.
        self._lock = threading.Lock()
        self._linears = linear_layers(loaded.model)
        # Called whenever a layer is done, in every direction: who waits sees that passes go on. On
        # CUDA the device may be behind by a pass.
        self.on_step: Callable[[], None] = lambda: None
        # Asked between the backward passes of one job: whether others are to have their turn.
        self.should_stop: Callable[[], bool] = lambda: False
        # Time of all passes, by phase; checkpointing's second forward counts as backward.
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @property
    def attention(self) -> str:
        """Name of the attention kernel, for a result's provenance."""
        return kernel_for(self._loaded.device, self._loaded.dtype, head_size(self._loaded)).name

    @property
    def products(self) -> str:
        """Name of the library of large linear layers: ``"onednn"``, or ``"torch"``'s own choice."""
        return "onednn" if self._linears else "torch"

    def token_budget(self) -> int:
        """Return how many tokens to put into one pass; at least 1.

        As many as fit without checkpointing where that is allowed and they are enough to keep
        the device busy, else as many as fit with it; never more than ``MOST_TOKENS``.
        """
        fitting = self._memory.tokens(_USUAL_RULE, checkpointing=True)
        if self._checkpointing != "on":
            kept = self._memory.tokens(_USUAL_RULE, checkpointing=False)
            if self._checkpointing == "off" or kept >= _KEEPING_PAYS_FROM:
                fitting = kept
        return max(1, min(fitting, MOST_TOKENS[self._loaded.device.type]))

    def trim(self) -> None:
        """Give the host's memory back that passes have freed; call it when nothing waits."""
        self._trimmer.trim()

    def run(self, jobs: Sequence[TraceJob]) -> list[Outcome]:
        """Trace jobs of one batch key, of any lengths; return one outcome per job, in order.

        Where memory does not suffice for all of them they are traced in smaller batches, and at
        last one by one with checkpointing. An outcome is an error where the job's own numbers are
        not finite, where it alone does not fit into memory, or where a target is always zero.

        Where `should_stop` answers True between the backward passes of a job that does not pack its
        targets, the result has the job's first targets only.

        Raises `PassFailedError`: the pass itself failed, not for memory; no job has a
        result.
        """
        # Equal lengths next to each other: they share calls of the attention kernel.
        order = sorted(range(len(jobs)), key=lambda index: jobs[index].total_tokens)
        with self._exclusive():
            found = self._run_with_second_tries([jobs[index] for index in order])
        outcomes = dict(zip(order, found, strict=True))
        return [outcomes[index] for index in range(len(jobs))]

    def join(self, parts: Sequence[JobResult]) -> JobResult:
        """Return the result of a job whose targets were traced in parts."""
        targets = tuple(target for part in parts for target in part.targets)
        firsts = accumulate((len(part.targets) for part in parts), initial=0)
        tensors = tuple(
            tensor if first == 0 else replace(tensor, trace=first + tensor.trace)
            for part, first in zip(parts, firsts, strict=False)
            for tensor in part.tensors
        )
        checkpointing = any(part.checkpointing for part in parts)
        return JobResult(targets, tensors, checkpointing, hints=hints(self._vocabulary, targets))

    def begin(self, jobs: Sequence[Job]) -> Generation | Atlas:
        """Begin a job that takes many passes: a generation of several jobs, or one atlas.

        Raises `EngineError`: the tables of an atlas do not fit into memory.
        """
        atlases = [job for job in jobs if isinstance(job, AtlasJob)]
        if not atlases:
            generations = [job for job in jobs if isinstance(job, GenerateJob)]
            return self._generation(generations)
        (job,) = atlases
        size = Atlas.table_bytes(self._loaded.shape, job.k)
        if (fault := self._memory.atlas_fault(job.k, size)) is not None:
            raise fault
        return Atlas(self._loaded, job)

    def advance(
        self,
        task: Generation | Atlas,
        on_token: Callable[[], None] | None = None,
        steps: int = DECODE_STEPS,
    ) -> int:
        """Generate up to `steps` tokens of each job, or run the next pass of an atlas.

        Returns how many steps it took: fewer where a job has ended. Jobs may join a generation
        before, and in `on_token`, which is called after each step.

        Raises `EngineError`: the numbers of an atlas are not finite, or its pass does not fit into
        memory, and is not made smaller, for then its numbers would be others; `InvalidJob`: a
        prompt's target is always zero.
        """
        with self._exclusive():
            if isinstance(task, Atlas):
                self._advance_atlas(task)
                return 1
            with self._timed() as timer, through_onednn(self._linears):
                timer.start("forward")
                return task.decode(steps, on_token)

    def _generation(self, jobs: Sequence[GenerateJob]) -> Generation:
        return Generation(self._loaded, jobs, self._memory.generation_fault)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock, self._steps_noted():
            try:
                yield
            except torch.AcceleratorError as error:
                # After such an error every further call of this process fails.
                raise DeviceLostError(f"{self._loaded.device} is lost: {error}") from error

    @contextmanager
    def _steps_noted(self) -> Iterator[None]:
        def note(*_: object) -> None:
            self.on_step()

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            note()
            hidden = first_output(output)
            if hidden.requires_grad:
                hidden.register_hook(note)  # type: ignore[no-untyped-call]

        with ExitStack() as hooks:
            for layer in self._loaded.family.decoder_layers(self._loaded.model):
                hooks.callback(layer.register_forward_hook(after).remove)
            yield

    @contextmanager
    def _timed(self) -> Iterator[PassTimer]:
        timer = PassTimer(self._loaded.device)
        yield timer
        for phase, seconds in timer.seconds().items():
            self.seconds[phase] += seconds

    def _run_with_second_tries(self, jobs: list[TraceJob]) -> list[Outcome]:
        """Run jobs; what is not finite once more, alone, for it may be a neighbour's fault.

        Some kernels of CPUs let a row that is not finite reach the row before it, which may be the
        last one of another prompt.
        """
        outcomes = self._run_jobs(jobs)
        if len(jobs) > 1:
            for index, outcome in enumerate(outcomes):
                if isinstance(outcome, NotFiniteError):
                    (outcomes[index],) = self._run_jobs([jobs[index]])
        return outcomes

    def _run_jobs(self, jobs: list[TraceJob]) -> list[Outcome]:
        """Run jobs, sorted by length: what has several backward passes apart from the others."""
        together = [copy for job in jobs if not job.alone for copy in job.copies]
        packed = iter(self._run(together) if together else ())
        return [
            self._run_alone(job)
            if job.alone
            else self._joined(list(islice(packed, len(job.copies))))
            for job in jobs
        ]

    def _run_alone(self, job: TraceJob) -> Outcome:
        """Run a job of several targets, until it is done or is to stop."""
        outcomes: list[Outcome] = []
        left = job.targets
        while left and not (outcomes and self.should_stop()):
            (outcome,) = self._run([job.with_targets(left)])
            outcomes.append(outcome)
            left = left[len(outcome.targets) :] if isinstance(outcome, JobResult) else ()
        return self._joined(outcomes)

    def _joined(self, outcomes: Sequence[Outcome]) -> Outcome:
        results = [outcome for outcome in outcomes if isinstance(outcome, JobResult)]
        fault = next((outcome for outcome in outcomes if not isinstance(outcome, JobResult)), None)
        return fault or self.join(results)

    def _run(self, jobs: list[TraceJob]) -> list[Outcome]:
        """Run jobs, sorted by length, together if they fit, else in halves, at last alone."""
        alone = len(jobs) == 1
        modes = {"on": [True], "auto": [False, True], "off": [False, True] if alone else [False]}
        for checkpointing in modes[self._checkpointing]:
            if checkpointing and jobs[0].alone:
                jobs = [jobs[0].with_targets(jobs[0].targets[:_TARGETS_PER_RECOMPUTE])]
            if not self._memory.fits(jobs, checkpointing, try_anyway=alone and checkpointing):
                continue
            outcomes = self._try_batch(jobs, checkpointing)
            if outcomes is not None:
                return outcomes
            if not alone:
                break
        if alone:
            return [self._memory.too_large(jobs)]
        half = len(jobs) // 2
        return [*self._run(jobs[:half]), *self._run(jobs[half:])]

    def _try_batch(self, jobs: list[TraceJob], checkpointing: bool) -> list[Outcome] | None:
        """Run one batch; None where memory ran out."""
        try:
            return self._run_batch(jobs, checkpointing)
        except (EngineError, DeviceLostError):
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                if isinstance(error, torch.AcceleratorError):
                    raise
                tokens = sum(len(job.token_ids) for job in jobs)
                raise PassFailedError(
                    f"the pass of {len(jobs)} jobs with {tokens} tokens failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
        # Out here the exception is gone, and with it the frames that held the pass's tensors.
        release(self._loaded.device)
        return None

    def _run_batch(self, jobs: list[TraceJob], checkpointing: bool) -> list[Outcome]:
        batch = PackedBatch.of(jobs)
        recorder = RelevanceRecorder(self._loaded, batch)
        with self._timed() as timer:
            scalars = self._trace(batch, recorder, timer, checkpointing)
            timer.start("transfer")
            recorder.finish()
        by_job: list[list[Scalar]] = [[] for _ in jobs]
        for scalar in scalars:
            by_job[scalar.job].append(scalar)
        outcomes: list[Outcome] = []
        for index, of_job in enumerate(by_job):
            try:
                targets = tuple(resolve(self._vocabulary, scalar) for scalar in of_job)
                outcomes.append(JobResult(targets, recorder.tensors(index), checkpointing))
            except (EngineError, InvalidJob) as error:
                outcomes.append(error)
        return outcomes

    def _trace(
        self, batch: PackedBatch, hooks: SiteHooks, timer: PassTimer, checkpointing: bool
    ) -> list[Scalar]:
        trace: Trace = partial(trace_keeping, stop=self.should_stop)
        if checkpointing:
            trace = trace_checkpointed
        if not batch.jobs[0].sites:
            trace = predict
        timer.start("forward")
        rule = self.rules[batch.jobs[0].rule]
        with apply_rule(self._loaded.model, rule), through_onednn(self._linears):
            return trace(self._loaded, batch, hooks, timer)

    def _advance_atlas(self, atlas: Atlas) -> None:
        prompts = atlas.job.prompts
        chosen = sorted(atlas.next_pass(), key=lambda index: prompts[index].total_tokens)
        if not chosen:
            return
        jobs = [prompts[index] for index in chosen]
        modes = [True] if self._checkpointing == "on" else [False, True]
        checkpointing = next((mode for mode in modes if self._memory.fits(jobs, mode)), None)
        if checkpointing is None:
            raise self._memory.too_large(jobs)
        atlas.checkpointing |= checkpointing
        batch = PackedBatch.of(jobs)
        numbers = [atlas.job.numbers[index] for index in chosen]
        recorder = AtlasRecorder(self._loaded, batch, atlas, numbers)
        with self._timed() as timer:
            scalars = self._trace(batch, recorder, timer, checkpointing)
        for scalar in scalars:
            number = numbers[scalar.job]
            try:
                atlas.targets[number] = resolve(self._vocabulary, scalar)
            except InvalidJob as error:
                what = f"prompt {number} of the corpus: "
                raise InvalidJob(
                    replace(fault, description=what + fault.description)
                    for fault in error.violations
                ) from error
