"""The reductions: what is kept of a site's relevance, on the device and in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class JobRows:
    """The index of a job among those that are reduced together, and its rows."""

    index: int
    start: int
    stop: int

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
        return min(self.k, (job.stop - job.start) * self.features)


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction, of all jobs in one go."""

    name: str
    # The shape of a reduced layer, which all its parts share.
    shape: Callable[[Sizes], tuple[int, ...]]
    # From relevance, float32 [N, F] ([N] if `by_row`), to one reduced layer, part by part.
    reduce: Callable[[torch.Tensor, Sequence[JobRows], Sizes], tuple[torch.Tensor, ...]]
    # From reduced layers, [..., *shape], to one job's part of them (a view).
    select: Callable[[torch.Tensor, JobRows, Sizes], torch.Tensor]
    # Name and dtype of each tensor that it yields.
    parts: tuple[tuple[str, torch.dtype], ...] = (("", torch.float32),)
    # It needs only the sum of each row, which is taken with the product in one go.
    by_row: bool = False


def _topk(
    relevance: torch.Tensor, jobs: Sequence[JobRows], sizes: Sizes
) -> tuple[torch.Tensor, ...]:
    """Find the k largest |R| of each job, by falling size, with their token and feature.

    A job with fewer than k values leaves the rest of its row 0; ``select`` cuts it off.
    """
    values = relevance.new_zeros(sizes.jobs, sizes.k)
    indices = torch.zeros(sizes.jobs, sizes.k, dtype=torch.int64, device=relevance.device)
    for job in jobs:
        flat = relevance[job.rows].flatten()
        count = sizes.topk(job)
        # NaN counts as largest, so that the check for finite numbers sees it.
        largest = flat.abs().topk(count).indices
        indices[job.index, :count] = largest
        values[job.index, :count] = flat[largest]
    tokens, features = indices // sizes.features, indices % sizes.features
    return values, tokens.int(), features.int()


REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction(
            "token",
            shape=lambda sizes: (sizes.rows,),
            reduce=lambda relevance, jobs, _: (relevance,),
            select=lambda reduced, job, _: reduced[..., job.rows],
            by_row=True,
        ),
        Reduction(
            "feature",
            shape=lambda sizes: (sizes.jobs, sizes.features),
            reduce=lambda relevance, jobs, _: (
                torch.stack([relevance[job.rows].sum(0) for job in jobs]),
            ),
            select=lambda reduced, job, _: reduced[..., job.index, :],
        ),
        Reduction(
            "topk",
            shape=lambda sizes: (sizes.jobs, sizes.k),
            reduce=_topk,
            select=lambda reduced, job, sizes: reduced[..., job.index, : sizes.topk(job)],
            parts=(("values", torch.float32), ("token", torch.int32), ("feature", torch.int32)),
        ),
        Reduction(
            "full",
            shape=lambda sizes: (sizes.rows, sizes.features),
            reduce=lambda relevance, jobs, _: (relevance,),
            select=lambda reduced, job, _: reduced[..., job.rows, :],
        ),
    )
}
