"""Requests, as clients make them, and jobs, as the engine runs them: plain values, no protobuf.

``reltrace_worker.models.JobPreparer`` checks a request against the loaded model and returns the
job. There are three kinds of jobs: a trace, the generation of text, and an atlas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace

TokenRef = str | int
"""A token by its id, or by text: its name, or text that encodes to exactly one token."""

Span = tuple[int, int]
"""First and stop, as in ``range``."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, as the client gives it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the model's chat template turns into text."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """Where the content of a message is among the tokens of a prompt."""

    role: str
    tokens: Span


PromptInput = str | tuple[int, ...] | Chat
"""A prompt as text, as token ids that are used as they are, or as a conversation."""


@dataclass(frozen=True, slots=True)
class TargetRequest:
    """The scalar at which a backward pass starts, as a client asks for it."""

    # None: the token with the largest logit.
    token: TokenRef | None = None
    # The prompt position whose next-token logits are read; negative counts from the end.
    position: int = -1
    # A token whose logit is subtracted.
    contrast: TokenRef | None = None
    # Response tokens behind the prompt; excludes the three fields above.
    continuation: str | tuple[int, ...] | None = None
    # One trace per response token instead of one of their summed logits.
    each: bool = False
    # Log-probability instead of logit.
    logprob: bool = False


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of a tensor in the forward pass: ``scale * x + value``, or ``x + direction``.

    To set a value v: scale 0, value v. To multiply by s: scale s, value 0.
    """

    site: str
    # 0 for a site without layers.
    layer: int = 0
    # Empty: all. In a request, negative positions count from the prompt's end.
    features: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    scale: float = 1.0
    value: float = 0.0
    # One value per feature of the site; empty: none.
    direction: tuple[float, ...] = ()
    # Add the mean embedding of the vocabulary; for the site "embed", without features.
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are generated after a prompt."""

    max_new_tokens: int
    # 0: always the token with the largest logit; else logits are divided by it and sampled.
    temperature: float = 0.0
    # Sample from the likeliest tokens that have this probability together; 0: from all.
    top_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt to trace. Without sites: a forward pass alone, which gives the targets."""

    input: PromptInput
    sites: tuple[str, ...] = ("resid",)
    reduction: str = "token"
    targets: tuple[TargetRequest, ...] = (TargetRequest(),)
    rule: str = "attnlrp"
    # Decoder layers that the result has, in this order; empty: all.
    layers: tuple[int, ...] = ()
    # With the reduction "topk": how many values of each layer; else 0.
    k: int = 0
    # Made in this order in the forward pass.
    edits: tuple[Edit, ...] = ()
    # Put in front of a text what the tokenizer puts there (BOS), unless it is there already.
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Text to generate after a prompt."""

    input: PromptInput
    sampling: Sampling
    edits: tuple[Edit, ...] = ()
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class AtlasRequest:
    """The prompts of one atlas."""

    prompts: tuple[str | Chat, ...]
    # Places that are kept of each feature.
    k: int = 0
    rule: str = "attnlrp"
    targets: tuple[TargetRequest, ...] = (TargetRequest(),)
    edits: tuple[Edit, ...] = ()
    add_special_tokens: bool = True
    # Trace each prompt's own next tokens at so many positions, drawn with the seed, instead of
    # the target; at all positions where there are fewer. 0: trace the target.
    positions: int = 0
    seed: int = 0
    # Count a prompt's first token and special tokens among its places.
    keep_special: bool = False


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A prompt of which only the tokens are asked for; it needs no pass."""

    input: PromptInput
    add_special_tokens: bool = True


Request = TraceRequest | GenerateRequest | AtlasRequest | TokenizeRequest


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the model reads it, with all but the last token of a continuation."""

    token_ids: tuple[int, ...]
    # Readable text per token (Vocabulary.text).
    tokens: tuple[str, ...]
    # What the model reads, special tokens included, and the characters of each token in it.
    text: str = ""
    offsets: tuple[Span, ...] = ()
    turns: tuple[Turn, ...] = ()
    # Positions of the tokenizer's special tokens.
    special_positions: tuple[int, ...] = ()
    # Sentences for the user about how the input was read.
    hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Term:
    """One logit, or log-probability, of a target's sum."""

    # The position in the job's tokens whose next-token logits are read.
    position: int
    # None: the token with the largest logit at that position.
    token_id: int | None
    # -1 for a contrast.
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where one backward pass starts: at the weighted sum of the terms."""

    # At least one; the first names the target's token and position.
    terms: tuple[Term, ...]
    contrast_id: int | None = None
    logprob: bool = False
    # The response tokens that the terms stand for; empty without a continuation.
    continuation_ids: tuple[int, ...] = ()
    # Path of the request's target that this one stems from, for errors.
    field: str = dataclasses.field(default="targets[0]", compare=False)


@dataclass(frozen=True, slots=True)
class TraceJob:
    """A trace that was checked against the model; fields as in `TraceRequest`."""

    prompt: TokenizedPrompt
    targets: tuple[Target, ...]
    sites: tuple[str, ...] = ("resid",)
    reduction: str = "token"
    rule: str = "attnlrp"
    layers: tuple[int, ...] = ()
    k: int = 0
    edits: tuple[Edit, ...] = ()
    # Also return the likeliest tokens at each target's position.
    candidates: bool = True
    # Compute only the logits of the terms instead of whole rows: all terms have token ids, and
    # none is a log-probability.
    only_terms: bool = False
    # Pack the prompt once for each target, beside others, instead of running several backward
    # passes after one forward pass.
    packs_targets: bool = True

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids

    @property
    def batch_key(self) -> tuple[str, str]:
        """Jobs with equal keys may share a pass."""
        return "trace" if self.sites else "predict", self.rule

    @property
    def total_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def alone(self) -> bool:
        """Whether it is a batch of its own: with one forward pass for several backward passes."""
        return bool(self.sites) and not self.packs_targets and len(self.targets) > 1

    @property
    def copies(self) -> list[TraceJob]:
        """What is packed of it: itself, or a copy for each target."""
        if not self.sites or self.alone:
            return [self]
        return [self.with_targets((target,)) for target in self.targets]

    @property
    def rows(self) -> int:
        """How many rows of a pack it takes."""
        return self.total_tokens * (len(self.targets) if self.sites and not self.alone else 1)

    @property
    def passes(self) -> int:
        """How often its rows go through the model: forward, and backward for each target."""
        if not self.sites:
            return 1
        return 1 + len(self.targets) if self.alone else 2

    def with_targets(self, targets: tuple[Target, ...]) -> TraceJob:
        """Return the same job with some of its targets."""
        return self if len(targets) == len(self.targets) else replace(self, targets=targets)


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A generation that was checked against the model."""

    prompt: TokenizedPrompt
    sampling: Sampling
    edits: tuple[Edit, ...] = ()

    rule = reduction = ""
    batch_key = ("generate", "")
    passes = 1

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids

    @property
    def total_tokens(self) -> int:
        return len(self.token_ids) + self.sampling.max_new_tokens

    @property
    def rows(self) -> int:
        return self.total_tokens


@dataclass(frozen=True, slots=True, eq=False)
class AtlasJob:
    """An atlas whose prompts were checked and tokenized; further fields as in `AtlasRequest`."""

    # Those that can be traced, with one target each, and their numbers among all prompts.
    prompts: tuple[TraceJob, ...]
    numbers: tuple[int, ...]
    # The numbers of the others, and why they are left out.
    skipped: tuple[tuple[int, str], ...]
    k: int
    rule: str = "attnlrp"
    # The targets are the prompts' own next tokens.
    next_tokens: bool = False
    # Ids of the tokenizer's special tokens.
    special: frozenset[int] = frozenset()
    keep_special: bool = True

    reduction = "atlas"
    passes = 1

    def counted_positions(self, token_ids: Sequence[int]) -> list[int]:
        """Return the positions of a prompt that are counted among its places, ascending."""
        if self.keep_special:
            return list(range(len(token_ids)))
        return [i for i, token in enumerate(token_ids) if i and token not in self.special]

    @property
    def batch_key(self) -> tuple[str, str]:
        return "atlas", self.rule

    @property
    def total_tokens(self) -> int:
        return sum(job.total_tokens for job in self.prompts)

    @property
    def rows(self) -> int:
        return self.total_tokens


Job = TraceJob | GenerateJob | AtlasJob
