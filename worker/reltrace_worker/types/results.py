"""Results of the engine: plain values, no protobuf, no gRPC."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reltrace_worker.types.errors import EngineError, InvalidJob
from reltrace_worker.types.jobs import Target


@dataclass(frozen=True, slots=True, eq=False)
class SiteTensor:
    """The reduced relevance of one site for one target.

    `values` is float32, contiguous, on the CPU. With L layers asked for, T tokens, F features:
    ``token`` is [L, T], ``feature`` [L, F], ``full`` [L, T, F]; ``embed`` lacks the axis L.
    ``topk`` is three parts of shape [L, min(k, T * F)]: ``values``, by falling |R|, and their
    indices ``token`` and ``feature``, int32.
    """

    # Index of the target in the job.
    trace: int
    site: str
    # Which tensor of the site, where a reduction yields several; else empty.
    part: str
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that may follow at a target's position."""

    token_id: int
    token: str
    logit: float
    probability: float


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """A target with what the pass found."""

    target: Target
    # The traced token and its text; of a summed continuation, its first token and the whole text.
    token_id: int
    token: str
    # The text of the token that was subtracted, or "".
    contrast: str
    # The scalar that the backward pass started from: a logit, a log-probability, or a sum of them.
    logit: float
    # The logit of the token itself.
    token_logit: float = 0.0
    # The likeliest tokens at the first term's position, the likeliest first.
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """What a model generated after a prompt."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    # Decoded together, without special tokens.
    text: str
    # Of each token under the model, without temperature and top_p.
    logprobs: tuple[float, ...]
    # The last token is an end-of-sequence token.
    stopped: bool


@dataclass(frozen=True, slots=True, eq=False)
class JobResult:
    """The result of one job: a trace, a generation or an atlas."""

    # One per trace.
    targets: tuple[ResolvedTarget, ...] = ()
    # For each trace in turn, one per site in the order of the job; or those of an atlas.
    tensors: tuple[SiteTensor, ...] = ()
    # The layers were recomputed in the backward pass.
    checkpointing: bool = False
    generated: GeneratedText | None = None
    # Sentences for the user about the targets.
    hints: tuple[str, ...] = ()


Outcome = JobResult | EngineError | InvalidJob
"""What came of one job."""
