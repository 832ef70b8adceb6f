"""The target of a trace, and what computed it."""

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
        `logit` is a log-probability.
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
    """What computed the numbers of a trace.

    Attributes
    ----------
    model, revision : str
        Name and revision of the model.
    rule : str
        The propagation rule, such as "attnlrp".
    reduction : str
        What was summed before the result was sent: "token", "feature", ...
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
        Whose functions the rule ran: "fused" (the worker's own) or "lxt". Empty where no function
        of the model was replaced (rule "gradient").
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
    """Where a job's time went.

    Attributes
    ----------
    queued : float
        Seconds from acceptance to the lease of the attempt that succeeded.
    engine : float
        Seconds of the pass that the job was part of, with all jobs it was packed with.
    """

    queued: float
    engine: float
