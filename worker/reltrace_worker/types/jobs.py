"""What goes into the engine: plain values, no protobuf, no gRPC.

A :class:`JobSpec` is what a client asked for. ``reltrace_worker.models.JobPreparer`` checks it
against the loaded model and turns it into a :class:`PreparedJob`; the engine turns that into a
``reltrace_worker.types.results.JobResult``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TokenRef = str | int
"""One token: its text (its name, or what encodes to exactly one token) or its id."""

Span = tuple[int, int]
"""First and stop, as in ``range``."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as a client gives it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, for the model's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: its content is the `tokens` of a job."""

    role: str
    tokens: Span


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
class CorpusSpec:
    """Prompts of one atlas.

    Parameters
    ----------
    prompts
        Texts and conversations.
    positions
        Explain each prompt's own next token at so many of its positions, drawn with `seed`; at
        all of them where it has fewer. 0: the job's target.
    seed
        Of the draws.
    keep_special
        Count the first token of a prompt and special tokens among its places.
    """

    prompts: tuple[str | Chat, ...]
    positions: int = 0
    seed: int = 0
    keep_special: bool = False


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One prompt to trace, as a client asks for it.

    Parameters
    ----------
    input
        Prompt text, token ids (used as they are), or a conversation (the model's chat template
        makes text of it).
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
    add_special_tokens
        Put in front of a prompt text what the tokenizer puts there (BOS), unless it has it.
    tokenize_only
        No pass: the result is how the input is read.
    """

    input: str | tuple[int, ...] | Chat
    sites: tuple[str, ...] = ("resid",)
    reduction: str = "token"
    targets: tuple[TargetSpec, ...] = (TargetSpec(),)
    rule: str = "attnlrp"
    layers: tuple[int, ...] = ()
    k: int = 0
    edits: tuple[EditSpec, ...] = ()
    forward_only: bool = False
    generation: GenerationSpec | None = None
    corpus: CorpusSpec | None = None
    add_special_tokens: bool = True
    tokenize_only: bool = False


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
        Readable text per token, as in ``Vocabulary.text``.
    sites, reduction, rule
        Names, all known.
    targets
        At least one, each gives one trace; none where tokens are written, or no pass is run.
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
    text
        What the model reads, special tokens included.
    offsets
        Of each token: its characters (code points) in `text`.
    turns
        Of a conversation.
    special_positions
        Tokens that are special ones of the tokenizer.
    hints
        What a reader should know of how the input was read, in sentences.
    candidates
        Look for the likeliest tokens at each target's position.
    only_terms
        Of the logits, those of the targets' terms alone are computed: all of them have token ids,
        and none is a log-probability.
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
    text: str = ""
    offsets: tuple[Span, ...] = ()
    turns: tuple[Turn, ...] = ()
    special_positions: tuple[int, ...] = ()
    hints: tuple[str, ...] = ()
    candidates: bool = True
    only_terms: bool = False

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
    next_tokens
        What is explained are the prompts' own next tokens.
    special
        Ids of the tokenizer's special tokens.
    keep_special
        The first token of a prompt and special tokens are counted among its places.
    """

    prompts: tuple[PreparedJob, ...]
    numbers: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...]
    k: int
    rule: str = "attnlrp"
    next_tokens: bool = False
    special: frozenset[int] = frozenset()
    keep_special: bool = True

    def counted(self, token_ids: Sequence[int]) -> list[int]:
        """Return the positions of a prompt that are counted among the places, rising."""
        if self.keep_special:
            return list(range(len(token_ids)))
        return [i for i, token in enumerate(token_ids) if i and token not in self.special]

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
