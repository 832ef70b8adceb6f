"""What a target came to in a pass: its token, its number, and what else was likely there."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from reltrace_worker.engine.pack import Candidates, Scalar
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import Target, TraceJob
from reltrace_worker.types.results import Candidate, ResolvedTarget

_MUCH_LIKELIER = math.log(10)
"""Between two logits at one position: ten times the probability."""


def resolve(vocabulary: Vocabulary, job: TraceJob, scalar: Scalar) -> ResolvedTarget:
    """Return a target as the pass resolved it.

    Raises
    ------
    EngineError
        Its scalar is not finite, or nothing but zero.
    """
    target = job.targets[scalar.target]
    value = float(scalar.value)
    if not math.isfinite(value):
        raise EngineError(
            f"the scalar of target {scalar.target} is {value}: the model's weights or "
            "activations overflow, or are not finite themselves"
        )
    if scalar.token_ids[0] == target.contrast_id:
        raise EngineError(
            f"the contrast of target {scalar.target} is the token that has the largest logit "
            "itself: the difference is always zero"
        )
    text = vocabulary.text
    ids = target.continuation_ids
    return ResolvedTarget(
        target,
        token_id=scalar.token_ids[0],
        token=text(scalar.token_ids[0]) if len(ids) < 2 else vocabulary.joined(ids),
        logit=value,
        contrast="" if target.contrast_id is None else text(target.contrast_id),
        candidates=_candidates(vocabulary, scalar.candidates),
    )


def hints(vocabulary: Vocabulary, job: TraceJob, scalars: Iterable[Scalar]) -> tuple[str, ...]:
    """Return what a reader should know of the targets, each once."""
    scalars = list(scalars)
    # What is explained of the job, and where. A reader who asks for both tokens compares them.
    asked = {
        (term.position, token)
        for scalar in scalars
        for term, token in zip(job.targets[scalar.target].terms, scalar.token_ids, strict=True)
    }
    found = (_twin(vocabulary, job.targets[scalar.target], scalar, asked) for scalar in scalars)
    return tuple(dict.fromkeys(hint for hint in found if hint))


def _twin(
    vocabulary: Vocabulary,
    target: Target,
    scalar: Scalar,
    asked: Collection[tuple[int, int]],
) -> str:
    """Say so where a token is explained that is likely with a space before it, or without."""
    position, token = target.terms[0].position, target.terms[0].token_id
    if token is None or scalar.candidates is None:
        return ""
    name = vocabulary.text(token)
    twin = vocabulary.find(name[1:] if name.startswith(" ") else f" {name}")
    if twin not in scalar.candidates.token_ids or (position, twin) in asked:
        return ""
    logit = float(scalar.logit)
    likely = scalar.candidates.logits[scalar.candidates.token_ids.index(twin)]
    if likely - logit < _MUCH_LIKELIER:
        return ""
    return (
        f"The target {name!r} has the logit {logit:.2f}; {vocabulary.text(twin)!r}, which is "
        f"another token, has {likely:.2f} at the same position."
    )


def _candidates(vocabulary: Vocabulary, found: Candidates | None) -> tuple[Candidate, ...]:
    # Where some logit is not finite there is no probability either.
    if found is None or not all(map(math.isfinite, found.probabilities)):
        return ()
    return tuple(
        Candidate(token, vocabulary.text(token), logit, probability)
        for token, logit, probability in zip(
            found.token_ids, found.logits, found.probabilities, strict=True
        )
    )
