"""Checks the corpus of an atlas and tokenizes it; chooses what its prompts explain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from hashlib import sha256

from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.jobs import (
    CorpusSpec,
    JobSpec,
    PreparedCorpus,
    PreparedJob,
    PreparedTarget,
    Term,
)

MOST_PROMPTS = 1 << 16
"""Of one atlas."""

MOST_CORPUS_TOKENS = 1 << 16
"""Of one prompt of an atlas: a place has 16 bits for the token."""

MOST_PLACES = 64
"""That an atlas keeps of each feature."""


def prepare_corpus(
    spec: JobSpec,
    prepare: Callable[[JobSpec], PreparedJob],
    rules: Collection[str],
    special: frozenset[int],
) -> PreparedCorpus:
    """See `JobPreparer.prepare_corpus`.

    Parameters
    ----------
    spec
        Has a corpus.
    prepare
        Checks and tokenizes one prompt.
    rules
        Names of those that are known.
    special
        Ids of the tokenizer's special tokens.
    """
    asked = spec.corpus or CorpusSpec(())
    faults = list(_faults(spec, asked, rules))
    if faults:
        raise InvalidJob(faults)
    corpus = PreparedCorpus(
        prompts=(),
        numbers=(),
        skipped=(),
        k=spec.k,
        rule=spec.rule,
        next_tokens=asked.positions > 0,
        special=special,
        keep_special=asked.keep_special,
    )
    prompts, numbers, skipped = [], [], []
    for number, prompt in enumerate(asked.prompts):
        try:
            job = prepare(replace(spec, input=prompt, corpus=None, k=0, sites=("neuron",)))
            prompts.append(_explaining(job, asked, corpus))
            numbers.append(number)
        except InvalidJob as error:
            skipped.append((number, str(error)))
    if not prompts:
        why = f"can not be traced, none of them: {skipped[0][1]}"
        raise InvalidJob([Violation("corpus.prompts", why)])
    return replace(corpus, prompts=tuple(prompts), numbers=tuple(numbers), skipped=tuple(skipped))


def _faults(spec: JobSpec, asked: CorpusSpec, rules: Collection[str]) -> list[Violation]:
    """Return what is wrong with what the prompts share."""
    found = []
    if not 1 <= (count := len(asked.prompts)) <= MOST_PROMPTS:
        found.append(Violation("corpus.prompts", f"are {count}; allowed: 1 to {MOST_PROMPTS}"))
    if not 1 <= spec.k <= MOST_PLACES:
        found.append(Violation("top_k", f"is {spec.k}; of an atlas, allowed: 1 to {MOST_PLACES}"))
    if spec.rule not in rules:
        allowed = ", ".join(rules)
        found.append(Violation("rule", f"rule {spec.rule!r} is unknown; allowed: {allowed}"))
    if len(spec.targets) != 1 or spec.targets[0].continuation is not None:
        found.append(Violation("targets", "of an atlas: one, and no continuation"))
    elif asked.positions and spec.targets != JobSpec("").targets:
        found.append(Violation("targets", "are the prompts' own next tokens (corpus.positions)"))
    return found


def _explaining(job: PreparedJob, asked: CorpusSpec, corpus: PreparedCorpus) -> PreparedJob:
    """Return a prompt of a corpus with what is explained of it.

    Raises
    ------
    InvalidJob
        It is too long, or has nothing to explain.
    """
    ids = job.token_ids
    if len(ids) > MOST_CORPUS_TOKENS:
        why = f"has {len(ids)} tokens; in an atlas at most {MOST_CORPUS_TOKENS}"
        raise InvalidJob([Violation("prompt", why)])
    # Of very many prompts at once, no more than the passes need.
    job = replace(job, text="", offsets=(), turns=(), hints=(), candidates=False)
    if not asked.positions:
        return job
    left_out = () if asked.keep_special else corpus.special
    # What is explained at a place that is not counted, and only there, would be of no effect.
    terms = [
        Term(position, ids[position + 1])
        for position in corpus.counted(ids)
        if position + 1 < len(ids) and ids[position + 1] not in left_out
    ]
    if not terms:
        why = f"has {len(ids)} tokens, and none of them follows one that is counted"
        raise InvalidJob([Violation("prompt", why)])
    target = PreparedTarget(_drawn(terms, asked.positions, asked.seed, ids))
    return replace(job, targets=(target,), only_terms=True)


def _drawn(
    terms: Sequence[Term], most: int, seed: int, token_ids: Sequence[int]
) -> tuple[Term, ...]:
    """Draw terms without replacement: by the prompt itself, whichever slice it is in."""
    if len(terms) <= most:
        return tuple(terms)
    of_prompt = sha256(repr((seed, tuple(token_ids))).encode()).digest()

    def lot(term: Term) -> bytes:
        return sha256(of_prompt + term.position.to_bytes(4, "big")).digest()

    return tuple(sorted(sorted(terms, key=lot)[:most], key=lambda term: term.position))
