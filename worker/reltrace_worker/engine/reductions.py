"""The reductions: what is kept of a site's relevance, on the device and in float32."""

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
class Extent:
    """The sizes of what is reduced.

    Parameters
    ----------
    rows, jobs, features
        N rows of J jobs, with F features each.
    k
        Values that the jobs want of each layer; 0 unless the reduction is ``topk``.
    """

    rows: int
    jobs: int
    features: int
    k: int

    def largest(self, span: Span) -> int:
        """Return how many values ``topk`` keeps of one job: k, or all where there are fewer."""
        return min(self.k, (span.stop - span.start) * self.features)


Reduce = Callable[[torch.Tensor, Sequence[Span], Extent], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction, of all jobs of a pack in one go.

    Parameters
    ----------
    name
        As jobs name it.
    shape
        From the extent to the shape of a reduced layer, which all its parts share.
    reduce
        From relevance, float32 [N, F], and the spans of the J jobs to one reduced layer, part by
        part.
    select
        From reduced layers, [..., *shape], to one job's part of them (a view).
    parts
        Name and dtype of each tensor that it yields.
    """

    name: str
    shape: Callable[[Extent], tuple[int, ...]]
    reduce: Reduce
    select: Callable[[torch.Tensor, Span, Extent], torch.Tensor]
    parts: tuple[tuple[str, torch.dtype], ...] = (("", torch.float32),)


def _largest(
    relevance: torch.Tensor, spans: Sequence[Span], extent: Extent
) -> tuple[torch.Tensor, ...]:
    """Find the k largest |R| of each job, by falling size, and where they stand.

    A job with fewer than k values leaves the rest of its row 0; ``select`` cuts it off.
    """
    values = relevance.new_zeros(extent.jobs, extent.k)
    places = torch.zeros(extent.jobs, extent.k, dtype=torch.int64, device=relevance.device)
    for span in spans:
        flat = relevance[span.rows].flatten()
        count = extent.largest(span)
        # NaN counts as largest, so that the check for finite numbers sees it.
        found = flat.abs().topk(count).indices
        places[span.index, :count] = found
        values[span.index, :count] = flat[found]
    tokens, features = places // extent.features, places % extent.features
    return values, tokens.int(), features.int()


REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction(
            "token",
            shape=lambda extent: (extent.rows,),
            reduce=lambda relevance, spans, _: (relevance.sum(-1),),
            select=lambda reduced, span, _: reduced[..., span.rows],
        ),
        Reduction(
            "feature",
            shape=lambda extent: (extent.jobs, extent.features),
            reduce=lambda relevance, spans, _: (
                torch.stack([relevance[span.rows].sum(0) for span in spans]),
            ),
            select=lambda reduced, span, _: reduced[..., span.index, :],
        ),
        Reduction(
            "topk",
            shape=lambda extent: (extent.jobs, extent.k),
            reduce=_largest,
            select=lambda reduced, span, extent: reduced[..., span.index, : extent.largest(span)],
            parts=(
                ("values", torch.float32),
                ("token", torch.int32),
                ("feature", torch.int32),
            ),
        ),
        Reduction(
            "full",
            shape=lambda extent: (extent.rows, extent.features),
            reduce=lambda relevance, spans, _: (relevance,),
            select=lambda reduced, span, _: reduced[..., span.rows, :],
        ),
    )
}
