"""What comes out of the engine: plain values, no protobuf, no gRPC."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class SiteTensor:
    """The reduced relevance of one site for one target.

    Parameters
    ----------
    trace
        Index of the target in the job.
    site
        Name of the site.
    part
        Which tensor of the site, where a reduction yields several; else empty.
    values
        float32, contiguous, on the CPU. With L layers asked for, T tokens, F features: ``token``
        is [L, T], ``feature`` [L, F], ``full`` [L, T, F]; ``embed`` lacks the axis L. ``topk`` is
        three parts of shape [L, min(k, T * F)]: ``values``, by falling size |R|, and ``token`` and
        ``feature``, int32, where they stand.
    """

    trace: int
    site: str
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
    """A target as the pass resolved it.

    Parameters
    ----------
    token_id
        The traced token; of a summed continuation, its first token.
    token
        Its readable text; of a summed continuation, the text of all response tokens.
    logit
        The scalar that the backward pass started from: a logit, a log-probability, or a
        difference or sum of them.
    position
        Absolute position whose next-token logits were read; of a summed continuation, the first.
    contrast_id, contrast
        The token that was subtracted; None and "" where there was none.
    logprob
        The scalar is made of log-probabilities.
    continuation_ids
        The response tokens that this trace stands for.
    candidates
        The likeliest tokens at `position`, the likeliest first; none where the pass did not look.
    """

    token_id: int
    token: str
    logit: float
    position: int
    contrast_id: int | None
    contrast: str
    logprob: bool
    continuation_ids: tuple[int, ...]
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after a prompt.

    Parameters
    ----------
    token_ids, tokens
        The new tokens, as ids and as readable text.
    text
        Decoded together, without special tokens.
    logprobs
        Log-probability of each under the model; temperature and top_p are left out.
    stopped
        The last one ends texts.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str
    logprobs: tuple[float, ...]
    stopped: bool


@dataclass(frozen=True, slots=True, eq=False)
class JobResult:
    """All traces of one job, or what was written after its prompt.

    Parameters
    ----------
    targets
        One per trace.
    tensors
        For each trace in turn, one per site in the order that the job named them.
    checkpointing
        The pass recomputed its layers in the backward pass instead of keeping them.
    written
        Of a job that asked for tokens.
    hints
        What a reader should know of the targets, in sentences.
    """

    targets: tuple[ResolvedTarget, ...]
    tensors: tuple[SiteTensor, ...]
    checkpointing: bool
    written: Written | None = None
    hints: tuple[str, ...] = ()
