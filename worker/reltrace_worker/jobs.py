"""What goes into the engine and what comes out: plain values, no protobuf, no gRPC.

A :class:`JobSpec` is what a client asked for. ``reltrace_worker.model.JobPreparer`` checks it
against the loaded model and turns it into a :class:`PreparedJob`; the engine turns that into a
:class:`JobResult`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TokenRef = str | int
"""One token: its text (which must encode to exactly one token) or its id."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """The scalar at which a backward pass starts, as a client asks for it.

    Parameters
    ----------
    token
        The token whose logit is traced; None: the one with the largest logit.
    position
        Prompt position whose next-token logits are read; negative counts from the end.
    contrast
        Subtract this token's logit.
    continuation
        Response tokens that follow the prompt, as text or as ids. Excludes `token`, `position`
        and `contrast`.
    each
        With `continuation`: one trace per response token instead of one of their summed logits.
    logprob
        Log-probability instead of logit.
    """

    token: TokenRef | None = None
    position: int = -1
    contrast: TokenRef | None = None
    continuation: str | tuple[int, ...] | None = None
    each: bool = False
    logprob: bool = False


@dataclass(frozen=True, slots=True)
class EditSpec:
    """A change of what flows through the model, as a client asks for it.

    What it touches becomes ``scale * x + value``, or ``x + direction``.

    Parameters
    ----------
    site
        Name of the site.
    layer
        Counted from 0; 0 for a site without layers.
    features
        Features that are changed; empty: all.
    positions
        Tokens that are changed, negative from the end of the prompt; empty: all.
    scale, value
        Set: (0, v). Multiply: (s, 0).
    direction
        Added instead: one value per feature of the site; empty: none.
    mean
        The mean over the vocabulary is added; of the site ``embed``, without features.
    """

    site: str
    layer: int = 0
    features: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    scale: float = 1.0
    value: float = 0.0
    direction: tuple[float, ...] = ()
    mean: bool = False


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """Tokens to write after a prompt.

    Parameters
    ----------
    max_new_tokens
        At most so many.
    temperature
        0: always the token with the largest logit; else logits are divided by it and drawn from.
    top_p
        Draw from the likeliest tokens that have this much probability together; 0: from all.
    seed
        Of the draws.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One prompt to trace, as a client asks for it.

    Parameters
    ----------
    input
        Prompt text (special tokens are added) or token ids (used as they are).
    sites
        Names of the sites where relevance is read.
    reduction
        Name of the reduction, one for all sites.
    targets
        They share one forward pass.
    rule
        Name of the rule that the backward pass follows.
    layers
        Decoder layers that the result has, in this order, counted from 0; empty: all.
    k
        With the reduction ``topk``: how many values of each layer; 0 with any other.
    edits
        Made in this order in the forward pass.
    forward_only
        No backward pass: the result has the targets, and no tensor.
    generation
        Write tokens instead of tracing; None: trace.
    corpus
        Prompts whose atlas is made, with `k` places each; `input` does not matter then.
    """

    input: str | tuple[int, ...]
    sites: tuple[str, ...] = ("resid",)
    reduction: str = "token"
    targets: tuple[TargetSpec, ...] = (TargetSpec(),)
    rule: str = "attnlrp"
    layers: tuple[int, ...] = ()
    k: int = 0
    edits: tuple[EditSpec, ...] = ()
    forward_only: bool = False
    generation: GenerationSpec | None = None
    corpus: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One logit (or log-probability) of a target's scalar.

    Parameters
    ----------
    position
        Absolute position in the job's tokens whose next-token logits are read.
    token_id
        None: the token with the largest logit at that position.
    weight
        Factor of this term in the scalar: 1, or -1 for a contrast.
    """

    position: int
    token_id: int | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PreparedTarget:
    """One backward pass: the scalar is the weighted sum of the terms.

    Parameters
    ----------
    terms
        At least one; the first names the target's token and position.
    contrast_id
        The token that is subtracted, where there is one.
    logprob
        The terms are log-probabilities instead of logits.
    continuation_ids
        The response tokens that the terms stand for; empty without a continuation.
    """

    terms: tuple[Term, ...]
    contrast_id: int | None = None
    logprob: bool = False
    continuation_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job that was checked against the model: tokenized, its targets resolved.

    Parameters
    ----------
    token_ids
        The T tokens of the pass: the prompt, then all but the last token of a continuation.
    tokens
        Readable text per token: decoded, or the raw vocabulary string where a token alone
        does not decode to valid text.
    sites, reduction, rule
        Names, all known.
    targets
        At least one, each gives one trace; none where tokens are written.
    layers
        Decoder layers that the result has, in this order; empty: all.
    k
        With the reduction ``topk``: how many values of each layer; else 0.
    edits
        Made in this order in the forward pass; positions count from 0.
    forward_only
        No backward pass, so no site.
    generation
        Tokens to write instead of a trace.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    sites: tuple[str, ...]
    reduction: str
    rule: str
    targets: tuple[PreparedTarget, ...]
    layers: tuple[int, ...] = ()
    k: int = 0
    edits: tuple[EditSpec, ...] = ()
    forward_only: bool = False
    generation: GenerationSpec | None = None

    @property
    def kind(self) -> tuple[str, str]:
        """What the jobs of one pass have in common: what it does, and by which rule."""
        if self.generation is not None:
            return "generate", ""
        return "predict" if self.forward_only else "trace", self.rule

    @property
    def takes_many_passes(self) -> bool:
        """It goes on in turns with others."""
        return self.generation is not None

    @property
    def extent(self) -> int:
        """Tokens that it has at its end."""
        written = 0 if self.generation is None else self.generation.max_new_tokens
        return len(self.token_ids) + written


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCorpus:
    """Prompts of one atlas, checked and tokenized.

    Parameters
    ----------
    prompts
        Those that can be traced, with one target each.
    numbers
        Of each: its number among all that were given.
    skipped
        Numbers of the others, and why.
    k
        Places that are kept of each feature.
    rule
        Name of the rule that the backward passes follow.
    """

    prompts: tuple[PreparedJob, ...]
    numbers: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...]
    k: int
    rule: str = "attnlrp"

    @property
    def reduction(self) -> str:
        """What is kept of the prompts' relevance."""
        return "atlas"

    @property
    def kind(self) -> tuple[str, str]:
        """What the jobs of one pass have in common."""
        return "atlas", self.rule

    @property
    def vocabulary(self) -> dict[int, str]:
        """The text of every token that is there, by its id, rising."""
        texts: dict[int, str] = {}
        for job in self.prompts:
            texts.update(zip(job.token_ids, job.tokens, strict=True))
        return dict(sorted(texts.items()))

    @property
    def takes_many_passes(self) -> bool:
        """It goes on in turns with others."""
        return True

    @property
    def extent(self) -> int:
        """Tokens of all prompts."""
        return sum(job.extent for job in self.prompts)


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
    """

    token_id: int
    token: str
    logit: float
    position: int
    contrast_id: int | None
    contrast: str
    logprob: bool
    continuation_ids: tuple[int, ...]


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
    """

    targets: tuple[ResolvedTarget, ...]
    tensors: tuple[SiteTensor, ...]
    checkpointing: bool
    written: Written | None = None
