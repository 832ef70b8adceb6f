"""What an atlas must say, by sorting, and what it says, in the same form."""

from __future__ import annotations

import torch
from reltrace_worker.engine.site_atlas import LISTS, POINT, SiteAtlas, places_of, values_of


def by_hand(values: torch.Tensor, places: torch.Tensor, k: int) -> list[list[tuple[float, int]]]:
    """The k largest positive values of each feature, of equal ones the earliest place."""
    lists = []
    for column in values.T.tolist():
        pairs = sorted((-v, p) for v, p in zip(column, places.tolist(), strict=True) if v > 0)
        lists.append([(-value, place) for value, place in pairs[:k]])
    return lists


def sums(atlas: SiteAtlas) -> torch.Tensor:
    return (atlas.high.double() * 2.0**32 + atlas.low) / 2.0**POINT


def listed(atlas: SiteAtlas, layer: int, which: str) -> list[list[tuple[float, int]]]:
    keys = atlas.strongest[layer, LISTS.index(which)].T
    return [
        [
            (float(value), int(place))
            for value, place in zip(values_of(row), places_of(row), strict=True)
            if place >= 0
        ]
        for row in keys
    ]
