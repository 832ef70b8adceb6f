"""The reductions: what is kept of a site's relevance, summed on the device in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one job among the N rows of a pack, and its index among the jobs there."""

    index: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction, of all jobs of a pack in one go.

    Parameters
    ----------
    name
        As jobs name it.
    shape
        From (N rows, J jobs, F features) to the shape of a reduced layer.
    reduce
        From relevance, float32 [N, F], and the spans of the J jobs to one reduced layer.
    select
        From reduced layers, float32 [..., *shape], and a span to that job's part of them (a view).
    """

    name: str
    shape: Callable[[int, int, int], tuple[int, ...]]
    reduce: Callable[[torch.Tensor, Sequence[Span]], torch.Tensor]
    select: Callable[[torch.Tensor, Span], torch.Tensor]


REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction(
            "token",
            shape=lambda rows, jobs, features: (rows,),
            reduce=lambda relevance, spans: relevance.sum(-1),
            select=lambda reduced, span: reduced[..., span.rows],
        ),
        Reduction(
            "feature",
            shape=lambda rows, jobs, features: (jobs, features),
            reduce=lambda relevance, spans: torch.stack(
                [relevance[span.rows].sum(0) for span in spans]
            ),
            select=lambda reduced, span: reduced[..., span.index, :],
        ),
        Reduction(
            "full",
            shape=lambda rows, jobs, features: (rows, features),
            reduce=lambda relevance, spans: relevance,
            select=lambda reduced, span: reduced[..., span.rows, :],
        ),
    )
}
