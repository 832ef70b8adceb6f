"""A packed batch in, relevance tensors out: pure torch, no gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from reltrace_worker.engine.atlas import AtlasCapture, Slice
from reltrace_worker.engine.budget import Trimmer, is_out_of_memory, release
from reltrace_worker.engine.capture import Capture
from reltrace_worker.engine.clock import PHASES, PassClock
from reltrace_worker.engine.memory import head_size
from reltrace_worker.engine.pack import Pack, Scalar
from reltrace_worker.engine.passes import predict, trace_checkpointed, trace_keeping
from reltrace_worker.engine.plan import Planner
from reltrace_worker.engine.resolve import hints, resolve
from reltrace_worker.engine.texts import Texts
from reltrace_worker.lrp import RULES, Rule, apply_rule
from reltrace_worker.lrp.attention import kernel_for
from reltrace_worker.lrp.linear import linear_layers, through_onednn
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import DeviceLostError, EngineError, PassFailedError
from reltrace_worker.types.jobs import AtlasJob, GenerateJob, TraceJob
from reltrace_worker.types.results import JobResult

Checkpointing = Literal["auto", "on", "off"]
_CHECKPOINTING = ("auto", "on", "off")

MOST_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Largest token budget per pass: beyond, a pass gets longer and not faster per token."""

_KEEPING_PAYS_FROM = 1024
"""Tokens per pass: with room for so many, passes without checkpointing are the faster ones."""

_USUAL_RULE = "attnlrp"

_STEPS = 16
"""Tokens that texts go on by at a time."""

Outcome = JobResult | EngineError


# Rules patch the model's instances: one pass at a time, whichever engine runs it.
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _lock_of(model: object) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


class Engine:
    """Runs batches of jobs on one loaded model.

    Parameters
    ----------
    loaded
        The model.
    checkpointing
        ``"on"``: keep only the input of each segment of layers in the forward and recompute the
        layers in the backward. ``"off"``: keep everything, one forward pass less. ``"auto"``:
        off where the pass fits into memory, else on. The numbers are the same.
    memory_bytes
        Bytes that a pass may use; None: what is free on CUDA, half of what is free on a CPU.
    rules
        The rules, by the names by which jobs ask for them.

    Raises
    ------
    ValueError
        `checkpointing` is none of these.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        checkpointing: Checkpointing = "auto",
        memory_bytes: int | None = None,
        *,
        rules: Mapping[str, Rule] = RULES,
    ) -> None:
        if checkpointing not in _CHECKPOINTING:
            raise ValueError(f"checkpointing is 'auto', 'on' or 'off', not {checkpointing!r}")
        self._loaded = loaded
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._checkpointing = checkpointing
        self.rules = rules
        self._planner = Planner(loaded, memory_bytes, rules)
        self._trimmer = Trimmer()
        self._lock = _lock_of(loaded.model)
        self._linears = linear_layers(loaded.model)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """What all passes took, by phase; checkpointing's second forward is backward here."""

    @property
    def attention(self) -> str:
        """Name of the attention kernel, for a result's provenance."""
        return kernel_for(self._loaded.device, self._loaded.dtype, head_size(self._loaded)).name

    def token_budget(self) -> int:
        """Return how many tokens to put into one pass; at least 1.

        As many as fit without checkpointing where that is allowed and they are enough to keep
        the device busy, else as many as fit with it; never more than ``MOST_TOKENS``.
        """
        fitting = self._planner.tokens(_USUAL_RULE, checkpointing=True)
        if self._checkpointing != "on":
            kept = self._planner.tokens(_USUAL_RULE, checkpointing=False)
            if self._checkpointing == "off" or kept >= _KEEPING_PAYS_FROM:
                fitting = kept
        return max(1, min(fitting, MOST_TOKENS[self._loaded.device.type]))

    def trim(self) -> None:
        """Give the host's memory back that passes have freed; call it when nothing waits."""
        self._trimmer.trim()

    def run(self, batch: Sequence[TraceJob | GenerateJob]) -> list[Outcome]:
        """Run every job; those of one kind (what it does, by which rule) share a pass.

        Where memory does not suffice for all of them they are traced in smaller packs, and at
        last one by one with checkpointing. Between calls the model is the one that was loaded.
        Calls from several threads, also to several engines on one model, wait for each other.

        Parameters
        ----------
        batch
            Jobs that ``JobPreparer.prepare`` made for this model, of any lengths.

        Returns
        -------
        list[JobResult | EngineError]
            One per job, in order; an error where the job's own numbers are not finite, or where
            it alone does not fit into memory.

        Raises
        ------
        PassFailedError
            The pass itself failed, not for memory; no job of the batch has a result.
        DeviceLostError
            The device does not work any more for this process.
        """
        by_kind: dict[tuple[str, str], list[int]] = {}
        for index, job in enumerate(batch):
            by_kind.setdefault(job.batch_key, []).append(index)
        results: dict[int, Outcome] = {}
        try:
            with self._lock:
                for (_, rule), indices in by_kind.items():
                    jobs = [batch[index] for index in indices]
                    traces = [job for job in jobs if isinstance(job, TraceJob)]
                    texts = [job for job in jobs if isinstance(job, GenerateJob)]
                    outcomes = self._run_jobs(rule, traces) if traces else self._write(texts)
                    results.update(zip(indices, outcomes, strict=True))
        except torch.AcceleratorError as error:
            # After such an error every further call of this process fails.
            raise DeviceLostError(f"{self._loaded.device} is lost: {error}") from error
        return [results[index] for index in range(len(batch))]

    def _run_jobs(self, rule: str, jobs: list[TraceJob]) -> list[Outcome]:
        """Trace jobs of one rule: together if they fit, else in halves, at last checkpointed."""
        alone = len(jobs) == 1
        modes = {"on": [True], "auto": [False, True], "off": [False, True] if alone else [False]}
        for checkpointing in modes[self._checkpointing]:
            if not self._planner.fits(jobs, checkpointing, try_anyway=alone and checkpointing):
                continue
            outcomes = self._run_pack(rule, jobs, checkpointing)
            if outcomes is not None:
                return outcomes if alone else self._with_second_tries(rule, jobs, outcomes)
            if not alone:
                break
        if alone:
            return [self._planner.too_large(jobs)]
        ordered = sorted(range(len(jobs)), key=lambda index: len(jobs[index].token_ids))
        half = len(ordered) // 2
        found: dict[int, Outcome] = {}
        for indices in (ordered[:half], ordered[half:]):
            outcomes = self._run_jobs(rule, [jobs[index] for index in indices])
            found.update(zip(indices, outcomes, strict=True))
        return [found[index] for index in range(len(jobs))]

    def _with_second_tries(
        self, rule: str, jobs: list[TraceJob], outcomes: list[Outcome]
    ) -> list[Outcome]:
        """Run what is not finite once more, alone: it may be a neighbour's fault.

        Some kernels of CPUs let a row that is not finite reach the row before it, which may be the
        last one of another prompt.
        """
        return [
            self._run_jobs(rule, [job])[0] if isinstance(outcome, EngineError) else outcome
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    def _run_pack(
        self, rule: str, jobs: list[TraceJob], checkpointing: bool
    ) -> list[Outcome] | None:
        """Run one pass; None where memory ran out."""
        try:
            return self._pass(rule, jobs, checkpointing)
        except EngineError:
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

    def _pass(self, rule: str, jobs: list[TraceJob], checkpointing: bool) -> list[Outcome]:
        pack = Pack.of(jobs)
        trace: Callable[[LoadedModel, Pack, Capture], list[Scalar]]
        trace = trace_checkpointed if checkpointing else trace_keeping
        if not jobs[0].sites:
            trace = _predict
        capture = Capture(self._loaded, pack)
        capture.clock.begins("forward")
        with apply_rule(self._loaded.model, self.rules[rule]), through_onednn(self._linears):
            scalars = trace(self._loaded, pack, capture)
        capture.clock.begins("transfer")
        capture.finish()
        for phase, seconds in capture.clock.seconds().items():
            self.seconds[phase] += seconds
        by_job: list[list[Scalar]] = [[] for _ in jobs]
        for scalar in scalars:
            by_job[scalar.job].append(scalar)
        outcomes: dict[int, Outcome] = {}
        for place, index in enumerate(pack.order):
            job = pack.jobs[place]
            try:
                targets = tuple(resolve(self._vocabulary, job, scalar) for scalar in by_job[place])
                outcomes[index] = JobResult(
                    targets,
                    capture.tensors(place),
                    checkpointing,
                    hints=hints(self._vocabulary, job, by_job[place]),
                )
            except EngineError as error:
                outcomes[index] = error
        return [outcomes[index] for index in range(len(jobs))]

    def _write(self, jobs: list[GenerateJob]) -> list[Outcome]:
        texts = self.begin(jobs)
        found: dict[int, Outcome] = {}
        while not texts.over:
            self.go_on(texts, _STEPS)
            found |= texts.ended()
        return [found[index] for index in range(len(jobs))]

    def begin(self, jobs: Sequence[GenerateJob]) -> Texts:
        """Begin texts that are written together; nothing is written yet.

        Parameters
        ----------
        jobs
            All with a `generation`.
        """
        return Texts(self._loaded, jobs, self._planner.fault_of_texts)

    def go_on(self, texts: Texts, tokens: int, wrote: Callable[[], None] | None = None) -> None:
        """Write at most so many further tokens of each text; call `wrote` after each.

        Raises
        ------
        DeviceLostError
            The device does not work any more for this process.
        """
        clock = PassClock(self._loaded.device)
        with self._lock:
            clock.begins("forward")
            try:
                with through_onednn(self._linears):
                    texts.go_on(tokens, wrote)
            except torch.AcceleratorError as error:
                raise DeviceLostError(f"{self._loaded.device} is lost: {error}") from error
        for phase, seconds in clock.seconds().items():
            self.seconds[phase] += seconds

    def begin_atlas(self, corpus: AtlasJob) -> Slice:
        """Begin the atlas of a corpus; nothing is in it yet.

        Raises
        ------
        EngineError
            Its tables do not fit into memory.
        """
        if (fault := self._planner.fault_of_atlas(corpus.k)) is not None:
            raise fault
        return Slice(self._loaded, corpus)

    def add_to(self, slice_: Slice) -> None:
        """Add the next pass to an atlas.

        Raises
        ------
        EngineError
            Its numbers are not finite, or the pass does not fit into memory. It is not made
            smaller, for then its numbers would be others.
        DeviceLostError
            The device does not work any more for this process.
        """
        corpus, chosen = slice_.corpus, slice_.take()
        if not chosen:
            return
        jobs = [corpus.prompts[index] for index in chosen]
        with self._lock:
            checkpointing = self._checkpointing == "on" or not self._planner.fits(jobs, False)
            if not self._planner.fits(jobs, checkpointing):
                raise self._planner.too_large(jobs)
            slice_.checkpointing |= checkpointing
            pack = Pack.of(jobs)
            numbers = [corpus.numbers[chosen[index]] for index in pack.order]
            capture = AtlasCapture(self._loaded, pack, corpus, numbers, slice_.atlas)
            trace = trace_checkpointed if checkpointing else trace_keeping
            capture.clock.begins("forward")
            try:
                rule = self.rules[jobs[0].rule]
                with apply_rule(self._loaded.model, rule), through_onednn(self._linears):
                    scalars = trace(self._loaded, pack, capture)
            except torch.AcceleratorError as error:
                raise DeviceLostError(f"{self._loaded.device} is lost: {error}") from error
        for phase, seconds in capture.clock.seconds().items():
            self.seconds[phase] += seconds
        for scalar in scalars:
            found = resolve(self._vocabulary, pack.jobs[scalar.job], scalar)
            slice_.targets[numbers[scalar.job]] = found

    def atlas(self, slice_: Slice) -> list[Outcome]:
        """Return an atlas as the result of its job; its targets are each token once.

        Nothing before it is over, or where nobody waits for it.
        """
        if slice_.dropped or not slice_.over:
            return []
        targets = {target.token_id: target for target in slice_.targets.values()}
        return [JobResult(tuple(targets.values()), slice_.tensors(), slice_.checkpointing)]


def _predict(loaded: LoadedModel, pack: Pack, _: Capture) -> list[Scalar]:
    return predict(loaded, pack)
