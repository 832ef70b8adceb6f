"""A packed batch in, relevance tensors out: pure torch, no gRPC."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Literal

from reltrace_worker.engine.capture import Capture
from reltrace_worker.engine.pack import Pack, Scalar
from reltrace_worker.engine.passes import trace_checkpointed, trace_keeping
from reltrace_worker.errors import EngineError
from reltrace_worker.jobs import JobResult, PreparedJob, ResolvedTarget
from reltrace_worker.model.loading import LoadedModel
from reltrace_worker.model.vocabulary import Vocabulary
from reltrace_worker.rules import RULES, apply_rule
from reltrace_worker.rules.kernels import kernel_for

Checkpointing = Literal["on", "off"]


def _head_size(loaded: LoadedModel) -> int:
    config: Any = loaded.model.config
    return int(getattr(config, "head_dim", None) or loaded.shape.hidden_size // loaded.shape.heads)


class Engine:
    """Runs batches of jobs on one loaded model.

    Parameters
    ----------
    loaded
        The model.
    checkpointing
        ``"on"``: keep only the input of each layer in the forward and recompute the layer in the
        backward. ``"off"``: keep everything, one forward pass less. The numbers are the same.

    Raises
    ------
    ValueError
        `checkpointing` is neither.
    """

    def __init__(self, loaded: LoadedModel, checkpointing: Checkpointing = "on") -> None:
        if checkpointing not in ("on", "off"):
            raise ValueError(f"checkpointing is 'on' or 'off', not {checkpointing!r}")
        self._loaded = loaded
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._trace = trace_checkpointed if checkpointing == "on" else trace_keeping
        self._checkpointing = checkpointing == "on"
        # Rules patch the model's instances: one pass at a time.
        self._lock = threading.Lock()

    @property
    def attention(self) -> str:
        """Name of the attention kernel, for a result's provenance."""
        return kernel_for(self._loaded.device, self._loaded.dtype, _head_size(self._loaded)).name

    @property
    def checkpointing(self) -> bool:
        """Layers are recomputed in the backward pass."""
        return self._checkpointing

    def run(self, batch: Sequence[PreparedJob]) -> list[JobResult | EngineError]:
        """Trace every job; those with the same rule share one forward pass.

        Between calls the model is the one that was loaded. Calls from several threads wait for
        each other.

        Parameters
        ----------
        batch
            Jobs that ``JobPreparer.prepare`` made for this model, of any lengths.

        Returns
        -------
        list[JobResult | EngineError]
            One per job, in order; an error where the job's own numbers are not finite.

        Raises
        ------
        EngineError
            The pass itself failed (out of memory, for example); no job of the batch has a result.
        """
        by_rule: dict[str, list[int]] = {}
        for index, job in enumerate(batch):
            by_rule.setdefault(job.rule, []).append(index)
        results: dict[int, JobResult | EngineError] = {}
        with self._lock:
            for rule, indices in by_rule.items():
                outcomes = self._run_pack(rule, [batch[index] for index in indices])
                results.update(zip(indices, outcomes, strict=True))
        return [results[index] for index in range(len(batch))]

    def _run_pack(self, rule: str, jobs: list[PreparedJob]) -> list[JobResult | EngineError]:
        pack = Pack.of(jobs)
        try:
            capture = Capture(self._loaded, pack)
            with apply_rule(self._loaded.model, RULES[rule]):
                scalars = self._trace(self._loaded, pack, capture)
            capture.finish()
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"the pass of {len(jobs)} jobs with {pack.packing.tokens} tokens failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        by_job: list[list[Scalar]] = [[] for _ in jobs]
        for scalar in scalars:
            by_job[scalar.job].append(scalar)
        outcomes: dict[int, JobResult | EngineError] = {}
        for place, index in enumerate(pack.order):
            try:
                outcomes[index] = self._result(pack, capture, place, by_job[place])
            except EngineError as error:
                outcomes[index] = error
        return [outcomes[index] for index in range(len(jobs))]

    def _result(self, pack: Pack, capture: Capture, place: int, scalars: list[Scalar]) -> JobResult:
        targets = tuple(self._resolve(pack.jobs[place], scalar) for scalar in scalars)
        return JobResult(targets, capture.tensors(place), self._checkpointing)

    def _resolve(self, job: PreparedJob, scalar: Scalar) -> ResolvedTarget:
        target = job.targets[scalar.target]
        value = float(scalar.value)
        if not math.isfinite(value):
            raise EngineError(
                f"the scalar of target {scalar.target} is {value}: the model's weights or "
                "activations overflow, or are not finite themselves"
            )
        text = self._vocabulary.text
        ids = target.continuation_ids
        return ResolvedTarget(
            token_id=scalar.token_ids[0],
            token=text(scalar.token_ids[0]) if len(ids) < 2 else self._vocabulary.joined(ids),
            logit=value,
            position=target.terms[0].position,
            contrast_id=target.contrast_id,
            contrast="" if target.contrast_id is None else text(target.contrast_id),
            logprob=target.logprob,
            continuation_ids=ids,
        )
