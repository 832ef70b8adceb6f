"""Checks the prompts of an atlas, tokenizes them, and chooses what is traced of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256

from reltrace_worker.engine.checks import check_name
from reltrace_worker.lrp import RULES
from reltrace_worker.types.errors import Faults, InvalidJob, Violation
from reltrace_worker.types.jobs import (
    AtlasJob,
    AtlasRequest,
    Target,
    TargetRequest,
    Term,
    TokenizedPrompt,
    TraceJob,
    TraceRequest,
)

MAX_PROMPTS = 1 << 16
"""Most prompts of one atlas."""

MAX_PROMPT_TOKENS = 1 << 16
"""Most tokens of a prompt: a place has 16 bits for the token."""

MAX_PLACES = 64
"""Most places that an atlas keeps of each feature."""


def prepare_atlas(
    request: AtlasRequest, prepare: Callable[[TraceRequest], TraceJob], special: frozenset[int]
) -> AtlasJob:
    """Check and tokenize the prompts of an atlas; those that can not be traced are left out.

    `prepare` checks and tokenizes one prompt; `special` are the tokenizer's special tokens.

    Raises `InvalidJob`: what the prompts share is wrong, or none of them can be traced.
    """
    _check_shared(request)
    atlas = AtlasJob(
        prompts=(),
        numbers=(),
        skipped=(),
        k=request.k,
        rule=request.rule,
        next_tokens=request.positions > 0,
        special=special,
        keep_special=request.keep_special,
    )
    prompts, numbers, skipped = [], [], []
    for number, prompt in enumerate(request.prompts):
        trace = TraceRequest(
            prompt,
            sites=("neuron",),
            targets=request.targets,
            rule=request.rule,
            edits=request.edits,
            add_special_tokens=request.add_special_tokens,
        )
        try:
            prompts.append(_with_targets(prepare(trace), request, atlas))
            numbers.append(number)
        except InvalidJob as error:
            skipped.append((number, str(error)))
    if not prompts:
        why = f"can not be traced, none of them: {skipped[0][1]}"
        raise InvalidJob([Violation("corpus.prompts", why)])
    return replace(atlas, prompts=tuple(prompts), numbers=tuple(numbers), skipped=tuple(skipped))


def _check_shared(request: AtlasRequest) -> None:
    faults = Faults()
    count, k = len(request.prompts), request.k
    what = f"are {count}; allowed: 1 to {MAX_PROMPTS}"
    faults.require(1 <= count <= MAX_PROMPTS, "corpus.prompts", what)
    what = f"is {k}; of an atlas, allowed: 1 to {MAX_PLACES}"
    faults.require(1 <= k <= MAX_PLACES, "top_k", what)
    check_name("rule", request.rule, RULES, "rule", faults)
    if len(request.targets) != 1 or request.targets[0].continuation is not None:
        faults.add("targets", "of an atlas: one, and no continuation")
    elif request.positions and request.targets != (TargetRequest(),):
        faults.add("targets", "are the prompts' own next tokens (corpus.positions)")
    faults.raise_any()


def _with_targets(job: TraceJob, request: AtlasRequest, atlas: AtlasJob) -> TraceJob:
    """Return a prompt of an atlas with its targets.

    Raises `InvalidJob`: it is too long, or has no next token to trace.
    """
    ids = job.token_ids
    if len(ids) > MAX_PROMPT_TOKENS:
        why = f"has {len(ids)} tokens; in an atlas at most {MAX_PROMPT_TOKENS}"
        raise InvalidJob([Violation("prompt", why)])
    # Many prompts are held at once: keep only what the passes need.
    job = replace(job, prompt=TokenizedPrompt(ids, job.prompt.tokens), candidates=False)
    if not request.positions:
        return job
    excluded = () if request.keep_special else atlas.special
    # A target at a position that is not counted would have no effect there.
    terms = [
        Term(position, ids[position + 1])
        for position in atlas.counted_positions(ids)
        if position + 1 < len(ids) and ids[position + 1] not in excluded
    ]
    if not terms:
        why = f"has {len(ids)} tokens, and none of them follows one that is counted"
        raise InvalidJob([Violation("prompt", why)])
    drawn = _draw(terms, request.positions, request.seed, ids)
    return replace(job, targets=(Target(drawn),), only_terms=True)


def _draw(
    terms: Sequence[Term], count: int, seed: int, token_ids: Sequence[int]
) -> tuple[Term, ...]:
    """Draw terms without replacement, by the prompt itself: the same in every slice of a corpus."""
    if len(terms) <= count:
        return tuple(terms)
    prompt_hash = sha256(repr((seed, tuple(token_ids))).encode()).digest()

    def lot(term: Term) -> bytes:
        return sha256(prompt_hash + term.position.to_bytes(4, "big")).digest()

    return tuple(sorted(sorted(terms, key=lot)[:count], key=lambda term: term.position))
