"""The resolved target of a trace, and the model and versions that computed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Candidate(NamedTuple):
    """A token that may follow at a target's position.

    Attributes
    ----------
    token : str
        Its text, as in `Trace.tokens`.
    token_id : int
        Its id.
    logit : float
        Its logit.
    probability : float
        Its probability at this position, from 0 to 1.
    """

    token: str
    token_id: int
    logit: float
    probability: float


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """The target as the worker resolved it.

    Attributes
    ----------
    token : str
        The token whose logit was traced.
    token_id : int
        Its id.
    logit : float
        The value that the backward pass started from: the logit, or the log-probability,
        difference or sum that was asked for.
    position : int
        Absolute index of the prompt token whose next-token logits were read.
    contrast : str or None
        The token whose logit was subtracted.
    contrast_id : int or None
        Its id.
    logprob : bool
        Whether `logit` is a log-probability.
    continuation_ids : tuple of int
        The response tokens whose logits were summed.
    candidates : tuple of Candidate
        The 10 likeliest tokens at `position`, the likeliest first; empty if the pass did not
        compute them.
    """

    token: str
    token_id: int
    logit: float
    position: int
    contrast: str | None = None
    contrast_id: int | None = None
    logprob: bool = False
    continuation_ids: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Provenance:
    """The model, rule and versions that computed a trace.

    Attributes
    ----------
    model, revision : str
        Name and revision of the model.
    rule : str
        The propagation rule, such as "attnlrp".
    reduction : str
        The reduction of the result: "token", "feature", ...
    dtype : str
        Number format of the model's weights and activations.
    attention : str
        The attention kernel.
    checkpointing : bool
        Whether gradient checkpointing was on.
    device : str
        Where the model ran.
    versions : mapping of str to str
        Versions of torch, transformers and the worker; and of lxt, where its functions ran.
    rule_functions : str
        Which functions the rule used: "fused" (the worker's), "compiled" (the same, compiled by
        torch) or "lxt"; empty if it replaced no function of the model (rule "gradient").
    """

    model: str
    revision: str
    rule: str
    reduction: str
    dtype: str
    attention: str
    checkpointing: bool
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    rule_functions: str = ""


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a job was queued and computed.

    Attributes
    ----------
    queued : float
        Seconds from acceptance to the lease of the attempt that succeeded.
    engine : float
        Seconds of the pass that computed the job, together with all jobs packed with it.
    """

    queued: float
    engine: float
