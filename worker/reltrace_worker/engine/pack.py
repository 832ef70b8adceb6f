"""A pack: jobs behind one another in one sequence, and the scalars that they ask for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from reltrace_worker.lrp.attention import Packing, positions
from reltrace_worker.types.jobs import Target, TraceJob


@dataclass(frozen=True, slots=True)
class Pack:
    """Jobs of one rule that share a forward pass.

    Parameters
    ----------
    jobs
        In the order of their rows.
    order
        Index of each job in the sequence that the pack was made from.
    packing
        Layout of the N rows.
    """

    jobs: tuple[TraceJob, ...]
    order: tuple[int, ...]
    packing: Packing

    @staticmethod
    def of(jobs: Sequence[TraceJob]) -> Pack:
        """Pack jobs, those of equal length next to each other."""
        order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].token_ids))
        packed = tuple(jobs[index] for index in order)
        return Pack(packed, tuple(order), Packing(tuple(len(job.token_ids) for job in packed)))

    @property
    def passes(self) -> int:
        """Backward passes: the largest number of targets of one job."""
        return max(len(job.targets) for job in self.jobs)

    def token_ids(self, device: torch.device) -> torch.Tensor:
        """Return the token ids, int64 [1, N]."""
        return torch.tensor([[i for job in self.jobs for i in job.token_ids]], device=device)

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Return the position ids, int64 [1, N], restarting at 0 with each job."""
        return positions(self.packing, device)


CANDIDATES = 10
"""Likeliest tokens that are told of a target's position."""

_ROWS = 16
"""Whose logits are looked through at a time: in float32 they are a copy."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest next tokens at one position, the likeliest first."""

    token_ids: tuple[int, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scalar:
    """One target of one job, resolved: where its backward pass starts.

    Parameters
    ----------
    job, target
        Indices in the pack and in the job.
    token_ids
        The token of each term.
    value
        The scalar, float32 [], part of the graph.
    logit
        Of its first token, float32 [], without a graph.
    candidates
        At the position of its first term; None where its job does not ask for them.
    """

    job: int
    target: int
    token_ids: tuple[int, ...]
    value: torch.Tensor
    logit: torch.Tensor
    candidates: Candidates | None = None


class Readout:
    """The logits that a pack needs, and the scalars made of them.

    Parameters
    ----------
    pack
        The jobs.

    Attributes
    ----------
    only
        Of each row, the id of the one token whose logit is read; None: the logits of the whole
        vocabulary are.
    """

    def __init__(self, pack: Pack) -> None:
        self._targets: list[tuple[int, int, Target]] = [
            (j, t, target)
            for j, job in enumerate(pack.jobs)
            for t, target in enumerate(job.targets)
        ]
        starts = pack.packing.starts
        # Packed row of each term, in the order of the targets.
        term_rows = [starts[j] + t.position for j, _, target in self._targets for t in target.terms]
        self.only: list[int] | None = None
        if all(job.only_terms for job in pack.jobs):
            ids = [term.token_id for _, _, target in self._targets for term in target.terms]
            self.only = [token_id for token_id in ids if token_id is not None]
            assert len(self.only) == len(term_rows)
            # One row for each term, which may be twice the same.
            self._rows, self._term_rows = term_rows, list(range(len(term_rows)))
            self._told: list[int | None] = [None] * len(self._targets)
            return
        self._rows = sorted(set(term_rows))
        index = {row: i for i, row in enumerate(self._rows)}
        self._term_rows = [index[row] for row in term_rows]
        # Of each target, the row whose candidates are told.
        self._told = [
            index[starts[j] + target.terms[0].position] if pack.jobs[j].candidates else None
            for j, _, target in self._targets
        ]

    @property
    def rows(self) -> list[int]:
        """The P packed rows whose logits are read."""
        return list(self._rows)

    def scalars(self, logits: torch.Tensor) -> list[Scalar]:
        """Resolve every target against the logits.

        Parameters
        ----------
        logits
            [P, vocabulary], in the model's dtype; where `only` names tokens, [P, 1] of these.

        Returns
        -------
        list[Scalar]
            Job by job; values are float32 and carry the graph of `logits`.
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
        candidates = _candidates(logits.detach(), {row for row in self._told if row is not None})
        counts = [len(target.terms) for _, _, target in self._targets]
        scalars, first = [], 0
        parts = torch.split(values, counts)
        for (job, index, _), part, row in zip(self._targets, parts, self._told, strict=True):
            ids = tuple(token_ids[first : first + len(part)])
            told = None if row is None else candidates[row]
            scalars.append(Scalar(job, index, ids, part.sum(), plain[first], told))
            first += len(part)
        return scalars


def _candidates(logits: torch.Tensor, rows: Collection[int]) -> dict[int, Candidates]:
    """Return the likeliest tokens of some rows of logits, [P, vocabulary]."""
    ordered = sorted(rows)
    found: dict[int, Candidates] = {}
    for some in [ordered[at : at + _ROWS] for at in range(0, len(ordered), _ROWS)]:
        values = logits[torch.tensor(some, device=logits.device)].float()
        top, ids = values.topk(min(CANDIDATES, values.shape[-1]))
        shares = (top - values.logsumexp(-1, keepdim=True)).exp()
        # In one transfer: float64 holds all of them as they are.
        for row, (tokens, numbers, chances) in zip(
            some,
            torch.stack((ids.double(), top.double(), shares.double()), 1).tolist(),
            strict=True,
        ):
            # Of equal ones the first in the vocabulary first, as argmax has it.
            order = sorted(range(len(tokens)), key=lambda i: (-numbers[i], tokens[i]))
            found[row] = Candidates(
                tuple(int(tokens[i]) for i in order),
                tuple(numbers[i] for i in order),
                tuple(chances[i] for i in order),
            )
    return found
