"""Targets: from the logits of a pass to the scalars where backward starts, and their results."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import InvalidJob, NotFiniteError, Violation
from reltrace_worker.types.jobs import Target
from reltrace_worker.types.results import Candidate, ResolvedTarget

CANDIDATES = 10
"""How many of the likeliest tokens are returned for a target's position."""

_ROWS_AT_ONCE = 16
"""Rows of logits that are searched for candidates at a time: in float32 they are a copy."""

_MUCH_LIKELIER = math.log(10)
"""Between two logits at one position: ten times the probability."""


Likeliest = list[tuple[int, float, float]]
"""Id, logit and probability of the likeliest next tokens at one position, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """Where the backward pass of one target starts."""

    # Index of the job in the batch, and of the target in the job.
    job: int
    index: int
    target: Target
    # The token of each term.
    token_ids: tuple[int, ...]
    # float32 [], part of the graph.
    value: torch.Tensor
    # Logit of the first token, float32 [], without a graph.
    logit: torch.Tensor
    candidates: Likeliest | None = None


class Readout:
    """The logits that the targets of a batch need, and the scalars made of them."""

    def __init__(self, batch: PackedBatch) -> None:
        starts = batch.packing.starts
        self._targets: list[tuple[int, int, Target]] = [
            (j, t, target)
            for j, job in enumerate(batch.jobs)
            for t, target in enumerate(job.targets)
        ]
        terms = [
            (starts[j] + t.position, t) for j, _, target in self._targets for t in target.terms
        ]
        # Of each row, the id of the one token whose logit is read; None: the whole vocabulary.
        self.only: list[int] | None = None
        # Of each target: the row whose candidates are returned.
        self._candidate_rows: list[int | None] = [None] * len(self._targets)
        if all(job.only_terms for job in batch.jobs):
            # One row for each term, where the same may come twice.
            self.rows = [row for row, _ in terms]
            self.only = [term.token_id for _, term in terms if term.token_id is not None]
            assert len(self.only) == len(self.rows)
            self._term_rows = list(range(len(terms)))
            return
        # The P packed rows whose logits are read.
        self.rows = sorted({row for row, _ in terms})
        index = {row: i for i, row in enumerate(self.rows)}
        self._term_rows = [index[row] for row, _ in terms]
        for n, (j, _, target) in enumerate(self._targets):
            if batch.jobs[j].candidates:
                self._candidate_rows[n] = index[starts[j] + target.terms[0].position]

    def scalars(self, logits: torch.Tensor) -> list[Scalar]:
        """Resolve every target against the logits, job by job.

        `logits` are [P, vocabulary], in the model's dtype; where `only` names tokens, [P, 1]. The
        scalars are float32 and carry their graph.
        """
        terms = [(term, target.logprob) for _, _, target in self._targets for term in target.terms]
        largest: list[int] = []
        if any(term.token_id is None for term, _ in terms):
            largest = logits.detach().argmax(-1).tolist()
        token_ids = [
            largest[row] if term.token_id is None else term.token_id
            for (term, _), row in zip(terms, self._term_rows, strict=True)
        ]
        device = logits.device
        rows = torch.tensor(self._term_rows, device=device)
        columns = torch.tensor(token_ids if self.only is None else [0], device=device)
        values = logits[rows, columns].float()
        plain = values.detach()
        if any(logprob for _, logprob in terms):
            # log p = logit - logsumexp(logits); subtracted where a term asks for it.
            wanted = torch.tensor([i for i, (_, logprob) in enumerate(terms) if logprob])
            wanted = wanted.to(device)
            # Each row once, however many targets ask for it: it is as long as the vocabulary.
            once, which = torch.unique(rows[wanted], return_inverse=True)
            normalizer = logits[once].float().logsumexp(-1)[which]
            values = values.index_add(0, wanted, normalizer, alpha=-1)
        values = values * torch.tensor([term.weight for term, _ in terms], device=device)
        candidates = _candidates(
            logits.detach(), {row for row in self._candidate_rows if row is not None}
        )
        parts = torch.split(values, [len(target.terms) for _, _, target in self._targets])
        scalars, first = [], 0
        for (job, index, target), part, row in zip(
            self._targets, parts, self._candidate_rows, strict=True
        ):
            ids = tuple(token_ids[first : first + len(part)])
            likeliest = None if row is None else candidates[row]
            scalars.append(Scalar(job, index, target, ids, part.sum(), plain[first], likeliest))
            first += len(part)
        return scalars


def _candidates(logits: torch.Tensor, rows: Collection[int]) -> dict[int, Likeliest]:
    """Return the likeliest tokens of some rows of logits, [P, vocabulary]."""
    ordered = sorted(rows)
    candidates: dict[int, Likeliest] = {}
    for some in [ordered[at : at + _ROWS_AT_ONCE] for at in range(0, len(ordered), _ROWS_AT_ONCE)]:
        values = logits[torch.tensor(some, device=logits.device)].float()
        top, ids = values.topk(min(CANDIDATES, values.shape[-1]))
        probabilities = (top - values.logsumexp(-1, keepdim=True)).exp()
        # In one transfer: float64 holds all of them exactly.
        copied = torch.stack((ids.double(), top.double(), probabilities.double()), 1).tolist()
        for row, columns in zip(some, copied, strict=True):
            # Of equal logits the lowest token id first, as argmax has it.
            best = sorted(zip(*columns, strict=True), key=lambda c: (-c[1], c[0]))
            candidates[row] = [(int(token), logit, share) for token, logit, share in best]
    return candidates


def resolve(vocabulary: Vocabulary, scalar: Scalar) -> ResolvedTarget:
    """Return the result of a target.

    Raises `NotFiniteError`: its scalar is not finite; `InvalidJob`: it is always zero.
    """
    target, ids = scalar.target, scalar.target.continuation_ids
    value = float(scalar.value)
    if not math.isfinite(value):
        raise NotFiniteError(
            f"the scalar of {target.field} is {value}: the model's weights or activations "
            "overflow, or are not finite themselves"
        )
    text = vocabulary.text
    if scalar.token_ids[0] == target.contrast_id:
        what = (
            f"{text(target.contrast_id)!r} is the token with the largest logit at position "
            f"{target.terms[0].position} itself: the difference is always zero; name the target's "
            "token, or another contrast"
        )
        raise InvalidJob([Violation(f"{target.field}.contrast", what)])
    candidates = scalar.candidates or []
    # Where some logit is not finite there is no probability either.
    if not all(math.isfinite(probability) for _, _, probability in candidates):
        candidates = []
    return ResolvedTarget(
        target,
        token_id=scalar.token_ids[0],
        token=text(scalar.token_ids[0]) if len(ids) < 2 else vocabulary.joined(ids),
        contrast="" if target.contrast_id is None else text(target.contrast_id),
        logit=value,
        token_logit=float(scalar.logit),
        candidates=tuple(
            Candidate(token, text(token), logit, probability)
            for token, logit, probability in candidates
        ),
    )


def hints(vocabulary: Vocabulary, targets: Sequence[ResolvedTarget]) -> tuple[str, ...]:
    """Return the hints for the user about the targets of one job, each once."""
    # Who traces both spellings of a word compares them, and needs no hint.
    traced = {
        (term.position, resolved.token_id if term.token_id is None else term.token_id)
        for resolved in targets
        for term in resolved.target.terms
    }
    found = (_other_spelling(vocabulary, resolved, traced) for resolved in targets)
    return tuple(dict.fromkeys(hint for hint in found if hint))


def _other_spelling(
    vocabulary: Vocabulary, resolved: ResolvedTarget, traced: Collection[tuple[int, int]]
) -> str:
    """Return a hint where the target's token is much likelier with, or without, a leading space."""
    position, token = resolved.target.terms[0].position, resolved.target.terms[0].token_id
    if token is None:
        return ""
    name = vocabulary.text(token)
    other = vocabulary.find(name[1:] if name.startswith(" ") else f" {name}")
    logits = {candidate.token_id: candidate.logit for candidate in resolved.candidates}
    if other is None or other not in logits or (position, other) in traced:
        return ""
    logit, likely = resolved.token_logit, logits[other]
    if likely - logit < _MUCH_LIKELIER:
        return ""
    return (
        f"The target {name!r} has the logit {logit:.2f}; {vocabulary.text(other)!r}, which is "
        f"another token, has {likely:.2f} at the same position."
    )
