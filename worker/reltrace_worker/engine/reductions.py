"""The reductions: what is kept of a site's relevance, on the device and in float32.

All jobs are reduced by the same few operations, however many they are, and numbers of one that are
not finite reach no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from reltrace_worker.models.placement import to_device

_ROWS_PER_SUM = 64
"""Rows, and then sums of rows, that are added up one after another: of 4,096 rows the rounding
errors of 128 additions remain, and a GPU adds up 64 parts at once."""

_PADDING = 1.25
"""``topk`` pads jobs to the longest of those that it takes together: to so many times their length.
With 2 instead, a CPU took up to a third longer."""


_CPU_VALUES_AT_ONCE = 1 << 18
"""Values that ``topk`` takes together on a CPU, or one job: a copy of them stays in its cache."""


@dataclass(frozen=True, slots=True)
class JobRows:
    """The index of a job among those that are reduced together, and its rows."""

    index: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is reduced: N rows of J jobs, with F features each; k values per layer for ``topk``."""

    rows: int
    jobs: int
    features: int
    k: int

    def topk(self, job: JobRows) -> int:
        """Return how many values ``topk`` keeps of a job: k, or all where there are fewer."""
        return min(self.k, job.length * self.features)


Reducer = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""From relevance, float32 [N, F] ([N] if `by_row`), to one reduced layer, part by part."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction, of all jobs in one go."""

    name: str
    # The shape of a reduced layer, which all its parts share.
    shape: Callable[[Sizes], tuple[int, ...]]
    # Prepares the reduction of jobs, whose rows lie one after another, on a device.
    prepare: Callable[[Sequence[JobRows], Sizes, torch.device], Reducer]
    # From reduced layers, [..., *shape], to one job's part of them (a view).
    select: Callable[[torch.Tensor, JobRows, Sizes], torch.Tensor]
    # Name and dtype of each tensor that it yields.
    parts: tuple[tuple[str, torch.dtype], ...] = (("", torch.float32),)
    # It needs only the sum of each row, which is taken with the product in one go.
    by_row: bool = False


def _as_it_is(_: Sequence[JobRows], __: Sizes, ___: torch.device) -> Reducer:
    return lambda relevance: (relevance,)


def _feature(jobs: Sequence[JobRows], _: Sizes, device: torch.device) -> Reducer:
    """Sum up the rows of each job: blocks of them, then blocks of these sums, until one is left.

    The forward pass of ``embedding_bag`` adds up the rows of a bag in their order, on CUDA too.
    """
    counts = [job.length for job in jobs]
    levels: list[tuple[torch.Tensor, torch.Tensor]] = []
    while not levels or max(counts) > 1:
        firsts: list[int] = []
        start = 0
        for count in counts:
            firsts += range(start, start + count, _ROWS_PER_SUM)
            start += count
        rows = to_device(torch.arange(start), device)
        levels.append((rows, to_device(torch.tensor(firsts), device)))
        counts = [-(-count // _ROWS_PER_SUM) for count in counts]

    def reduce(relevance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for rows, bags in levels:
            relevance = embedding_bag(rows, relevance, bags, mode="sum")
        return (relevance,)

    return reduce


def _topk(jobs: Sequence[JobRows], sizes: Sizes, device: torch.device) -> Reducer:
    """Find the k largest |R| of each job, by falling size, with their token and feature.

    Of equal sizes any may come first. What a job with fewer than k values has behind them means
    nothing; ``select`` cuts it off.
    """

    def table(values: torch.Tensor) -> torch.Tensor:
        return to_device(values, device)

    # Jobs of about one length: their indices, rows and, where there is some, padding.
    tables: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    most_rows = _CPU_VALUES_AT_ONCE / sizes.features if device.type == "cpu" else math.inf
    for group in _of_similar_length(jobs, most_rows):
        rows = torch.tensor([job.start for job in group])[:, None] + torch.arange(group[0].length)
        stops = torch.tensor([job.stop for job in group])[:, None]
        padding = table((rows >= stops)[..., None]) if bool((rows >= stops).any()) else None
        indices = table(torch.tensor([job.index for job in group]))
        tables.append((indices, table(rows.minimum(stops - 1).flatten()), padding))
    firsts = table(torch.tensor([job.start for job in jobs])[:, None] * sizes.features)

    def reduce(relevance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Of each value that was found, its place in the job.
        places = torch.zeros(sizes.jobs, sizes.k, dtype=torch.int64, device=relevance.device)
        for indices, rows, padding in tables:
            values = relevance.index_select(0, rows).abs_().view(len(indices), -1, sizes.features)
            if padding is not None:
                values.masked_fill_(padding, -1.0)
            values = values.flatten(1)
            count = min(sizes.k, values.shape[1])
            # NaN counts as largest, so that the check for finite numbers sees it.
            places[:, :count].index_copy_(0, indices, values.topk(count).indices)
        flat = relevance.flatten()
        tokens = places // sizes.features
        features = places - tokens * sizes.features
        return flat[(places + firsts).clamp_(max=len(flat) - 1)], tokens.int(), features.int()

    return reduce


def _of_similar_length(jobs: Sequence[JobRows], most_rows: float) -> list[list[JobRows]]:
    """Group jobs that are padded to the first of each group, the longest, and then reduced."""
    groups: list[list[JobRows]] = []
    for job in sorted(jobs, key=lambda job: job.length, reverse=True):
        group = groups[-1] if groups else []
        longest = group[0].length if group else math.inf
        if longest <= _PADDING * job.length and longest * (len(group) + 1) <= most_rows:
            group.append(job)
        else:
            groups.append([job])
    return groups


REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction(
            "token",
            shape=lambda sizes: (sizes.rows,),
            prepare=_as_it_is,
            select=lambda reduced, job, _: reduced[..., job.rows],
            by_row=True,
        ),
        Reduction(
            "feature",
            shape=lambda sizes: (sizes.jobs, sizes.features),
            prepare=_feature,
            select=lambda reduced, job, _: reduced[..., job.index, :],
        ),
        Reduction(
            "topk",
            shape=lambda sizes: (sizes.jobs, sizes.k),
            prepare=_topk,
            select=lambda reduced, job, sizes: reduced[..., job.index, : sizes.topk(job)],
            parts=(("values", torch.float32), ("token", torch.int32), ("feature", torch.int32)),
        ),
        Reduction(
            "full",
            shape=lambda sizes: (sizes.rows, sizes.features),
            prepare=_as_it_is,
            select=lambda reduced, job, _: reduced[..., job.rows, :],
        ),
    )
}
