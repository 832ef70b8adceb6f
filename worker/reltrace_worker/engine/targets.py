"""Targets: from the logits of a pass to the scalars where backward starts, and their results."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.placement import to_device
from reltrace_worker.models.vocabulary import Vocabulary
from reltrace_worker.types.errors import InvalidJob, NotFiniteError, Violation
from reltrace_worker.types.jobs import Target
from reltrace_worker.types.results import Candidate, ResolvedTarget

CANDIDATES = 10
"""How many of the likeliest tokens are returned for a target's position."""

_CPU_VALUES_AT_ONCE, _VALUES_AT_ONCE = 1 << 20, 1 << 24
"""Logits that are searched for candidates at a time: in float32 they are a copy, and a CPU is
faster where that stays in its cache."""

_MUCH_LIKELIER = math.log(10)
"""Between two logits at one position: ten times the probability."""


Likeliest = list[tuple[int, float, float]]
"""Id, logit and probability of the likeliest next tokens at one position, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """Where the backward pass of one target started, and what its logits say."""

    # Index of the job in the batch, and of the target in the job.
    job: int
    index: int
    target: Target
    # The token of each term.
    token_ids: tuple[int, ...]
    # The weighted sum of the terms.
    value: float
    # Logit of the first token.
    logit: float
    candidates: Likeliest | None = None


class Readout:
    """What the targets of one batch read from the logits of its pass.

    The device gets all that it needs for that beforehand, and during the pass nothing waits for
    it: `terms` and `start` are for the backward passes, and `scalars` fetches what belongs to the
    results in one transfer.
    """

    def __init__(self, loaded: LoadedModel, batch: PackedBatch) -> None:
        starts = batch.packing.starts
        self._targets: list[tuple[int, int, Target]] = [
            (j, t, target)
            for j, job in enumerate(batch.jobs)
            for t, target in enumerate(job.targets)
        ]
        terms = [
            (starts[j] + t.position, t) for j, _, target in self._targets for t in target.terms
        ]
        # Only single logits are computed: of each term a row for itself, where the same may come
        # twice. Otherwise whole rows, each once.
        single = all(job.only_terms for job in batch.jobs)
        rows = [row for row, _ in terms]
        read = rows if single else sorted(set(rows))
        index = {row: i for i, row in enumerate(read)}
        term_rows = list(range(len(rows))) if single else [index[row] for row in rows]
        # Of each target: the row whose candidates are returned.
        self._candidate_rows = [
            index[starts[j] + target.terms[0].position]
            if batch.jobs[j].candidates and not single
            else None
            for j, _, target in self._targets
        ]
        self._candidates = sorted({row for row in self._candidate_rows if row is not None})
        # Terms that are log-probabilities, and their rows, each once: these are as long as the
        # vocabulary.
        counts = [len(target.terms) for _, _, target in self._targets]
        asked = [target.logprob for _, _, target in self._targets]
        logprobs = [m for m, flag in enumerate(_repeat(asked, counts)) if flag]
        normalized = {row: i for i, row in enumerate(dict.fromkeys(term_rows[m] for m in logprobs))}
        token_ids = [-1 if term.token_id is None else term.token_id for _, term in terms]
        self._any_largest = -1 in token_ids

        def column(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return to_device(torch.tensor(values, dtype=dtype), loaded.device)

        # The P packed rows whose logits are read, int64 [P].
        self.rows = column(read)
        # Of each term, the id of its token; -1: the one with the largest logit.
        self._token_ids = column(token_ids)
        # Of each row, the id of the one token whose logit is read, int64 [P]; None: all are.
        self.only = self._token_ids if single else None
        self._term_rows = column(term_rows)
        self._weights = column([term.weight for _, term in terms], torch.float32)
        self._passes = column(_repeat([t for _, t, _ in self._targets], counts))
        self._candidate_index = column(self._candidates)
        self._logprobs = column(logprobs)
        self._normalized = column(list(normalized))
        self._normalizers = column([normalized[term_rows[m]] for m in logprobs])
        # All that `scalars` needs, float64, which holds token ids and float32 exactly.
        self._found = torch.empty(0)

    def terms(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits or log-probabilities of the M terms, float32 [M], with their graph.

        `logits` are [P, vocabulary], in the model's dtype; where `only` names tokens, [P, 1].
        """
        token_ids, rows, candidates = (
            tensor.to(logits.device)
            for tensor in (self._token_ids, self._term_rows, self._candidate_index)
        )
        plain = logits.detach()
        if self._any_largest:
            token_ids = torch.where(token_ids < 0, plain.argmax(-1)[rows], token_ids)
        columns = token_ids if self.only is None else torch.zeros_like(token_ids)
        values = logits[rows, columns].float()
        found = [token_ids, values.detach()]
        if len(self._logprobs):
            # log p = logit - logsumexp(logits); subtracted where a term asks for it.
            wanted, once, which = (
                tensor.to(logits.device)
                for tensor in (self._logprobs, self._normalized, self._normalizers)
            )
            normalizer = logits[once].float().logsumexp(-1)[which]
            values = values.index_add(0, wanted, normalizer, alpha=-1)
        found += [values.detach(), *_candidates(plain, candidates)]
        self._found = torch.cat([part.flatten().double() for part in found])
        return values

    def start(self, target: int) -> torch.Tensor:
        """Return the gradient at the terms, float32 [M], that starts the targets of an index at 1.

        Jobs do not see each other, so the gradient of the sum of their scalars is each job's own.
        """
        start = self._weights * (self._passes == target)
        return start.to(self._found.device)

    def scalars(self) -> list[Scalar]:
        """Return the scalars, job by job. Waits for the device."""
        found = self._found.tolist()
        size = len(self._weights)
        ids, logits, values = (found[at : at + size] for at in (0, size, 2 * size))
        tables = _likeliest(found[3 * size :], len(self._candidates))
        likeliest = dict(zip(self._candidates, tables, strict=True))
        scalars, first = [], 0
        for (job, index, target), row in zip(self._targets, self._candidate_rows, strict=True):
            terms = slice(first, first + len(target.terms))
            value = sum(
                term.weight * value for term, value in zip(target.terms, values[terms], strict=True)
            )
            tokens = tuple(int(token) for token in ids[terms])
            candidates = None if row is None else likeliest[row]
            scalars.append(Scalar(job, index, target, tokens, value, logits[first], candidates))
            first = terms.stop
        return scalars


def _repeat(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


def _candidates(logits: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """Return the likeliest tokens of C rows of logits, [P, vocabulary].

    Blocks of [rows, 3, CANDIDATES], float64: ids, logits and probabilities.
    """
    blocks = []
    at_once = _CPU_VALUES_AT_ONCE if logits.device.type == "cpu" else _VALUES_AT_ONCE
    size = max(1, at_once // logits.shape[-1])
    for some in torch.split(rows, size) if len(rows) else ():
        values = logits[some].float()
        top, ids = values.topk(min(CANDIDATES, values.shape[-1]))
        probabilities = (top - values.logsumexp(-1, keepdim=True)).exp()
        blocks.append(torch.stack((ids.double(), top.double(), probabilities.double()), 1))
    return blocks


def _likeliest(found: list[float], rows: int) -> list[Likeliest]:
    """Return the likeliest tokens of each row from the blocks of `_candidates`, one by one."""
    width = len(found) // (3 * rows) if rows else 0
    likeliest = []
    for first in range(0, len(found), 3 * width or 1):
        ids, logits, shares = (found[first + i * width :][:width] for i in range(3))
        # Of equal logits the lowest token id first, as argmax has it.
        best = sorted(zip(ids, logits, shares, strict=True), key=lambda c: (-c[1], c[0]))
        likeliest.append([(int(token), logit, share) for token, logit, share in best])
    return likeliest


def resolve(vocabulary: Vocabulary, scalar: Scalar) -> ResolvedTarget:
    """Return the result of a target.

    Raises `NotFiniteError`: its scalar is not finite; `InvalidJob`: it is always zero.
    """
    target, ids = scalar.target, scalar.target.continuation_ids
    value = scalar.value
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
        token_logit=scalar.logit,
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
