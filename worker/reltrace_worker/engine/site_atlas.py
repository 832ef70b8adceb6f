"""The strongest places of the features of one site, merged on the device.

For every feature of a site this keeps the k places (prompt, token) where its relevance, and where
its activation, is strongest, positive and negative apart; and of both their sum and a histogram.
(The idea of relevance maximization is that of Achtibat et al., "From attribution maps to
human-understandable explanations", 2023, and of zennit-crp; here for language.)

All of it is exact and does not depend on the order or on the packs in which prompts come: a list is
the k largest of a set of distinct integers, and sums and histograms are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

LISTS = ("relevance+", "relevance-", "activation+", "activation-")
MEASURES = ("relevance", "activation")
SUMS = (*MEASURES, "relevance mass")
"""Mass is the size of the relevance, |R|, over all tokens."""

POINT = 40
"""Sums are kept in units of 2 to the power of minus this: about 1e-12."""

OCTAVES = range(-24, 8)
"""Histograms have one bin per octave of |x|, the first from 2**-24 to 2**-23."""

BINS = 2 * len(OCTAVES) + 1
"""Negative values, the largest first; what is smaller than 2**-24 either way; positive values."""

CLASSES = 1 << 9
"""Signs and exponents of float32: what is counted first, since there they stand as they are."""

_VALUES = 1 << 24
"""Values that are merged at a time: they need some 30 bytes each."""

_FEWEST_ROWS, _MOST_ROWS = 512, 2048
"""Of few rows, the look-up of what is large leaves more over than of many."""

_BLOCK = 16
"""Rows of which the largest value is looked up first: most are smaller than what is kept."""

_COARSE = 8

_BIAS, _MANTISSA = 127, 23
_LOW = (1 << 32) - 1


def keys_of(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return integers that are ordered as positive values, of equal ones the earliest place first.

    From values, float32 [N, F], and distinct places, int64 [N], less than 2**32, to int64 [N, F]:
    the value's bits above, the complement of the place below. Values that are not positive give 0.
    """
    # The bits of positive floats are ordered as the floats are.
    bits = values.view(torch.int32).long()
    keys = (bits << 32) | (_LOW - places)[:, None]
    return torch.where(values > 0, keys, keys.new_zeros(()))


def values_of(keys: torch.Tensor) -> torch.Tensor:
    """Return the values of keys, float32; 0 where there is none."""
    return (keys >> 32).int().view(torch.float32)


def places_of(keys: torch.Tensor) -> torch.Tensor:
    """Return the places of keys, int64; -1 where there is none."""
    return torch.where(keys > 0, _LOW - (keys & _LOW), keys.new_full((), -1))


def classes_of(values: torch.Tensor) -> torch.Tensor:
    """Return the sign bit and the exponent of each value, int32 from 0 to ``CLASSES`` - 1."""
    return (values.view(torch.int32) >> _MANTISSA).bitwise_and_(CLASSES - 1)


def bins_of(classes: torch.Tensor) -> torch.Tensor:
    """Return the bin of the values of each class, int32."""
    exponent = (classes & (CLASSES // 2 - 1)) - _BIAS
    step = (exponent - OCTAVES.start + 1).clamp(0, len(OCTAVES))
    return len(OCTAVES) + torch.where(classes < CLASSES // 2, step, -step)


@cache
def _all_bins(device: torch.device) -> torch.Tensor:
    return bins_of(torch.arange(CLASSES, dtype=torch.int32, device=device))


@dataclass(slots=True)
class SiteAtlas:
    """What is known of the features of one site."""

    # int64 [L, 4, k, F]: keys, in the order of LISTS, the strongest first; 0: there is none.
    strongest: torch.Tensor
    # float32 of the same shape: the activation at places of relevance, and the relevance at those
    # of activation; 0 where there is no place.
    beside: torch.Tensor
    # int64 [L, 3, F]: sums in the order of SUMS, in units of 2**-POINT, are high * 2**32 + low,
    # with low < 2**32.
    high: torch.Tensor
    low: torch.Tensor
    # int32 [L, 2, F, BINS], in the order of MEASURES.
    histogram: torch.Tensor

    @staticmethod
    def size(layers: int, features: int, k: int) -> int:
        """Return the bytes of an atlas."""
        return layers * features * (4 * k * (8 + 4) + len(SUMS) * 2 * 8 + 2 * BINS * 4)

    @classmethod
    def empty(cls, layers: int, features: int, k: int, device: torch.device) -> SiteAtlas:
        """Return the atlas of no prompt."""
        return cls(
            torch.zeros(layers, 4, k, features, dtype=torch.int64, device=device),
            torch.zeros(layers, 4, k, features, dtype=torch.float32, device=device),
            torch.zeros(layers, len(SUMS), features, dtype=torch.int64, device=device),
            torch.zeros(layers, len(SUMS), features, dtype=torch.int64, device=device),
            torch.zeros(layers, 2, features, BINS, dtype=torch.int32, device=device),
        )

    def add(
        self,
        layer: int,
        relevance: torch.Tensor,
        activation: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """Add rows of one layer, whose relevance and activation are float32 [N, F], finite.

        `rows`, int64 [M], are those that are added, and `places`, int64 [M], their places.
        """
        together = min(max(_VALUES // relevance.shape[-1], _FEWEST_ROWS), _MOST_ROWS)
        for start in range(0, len(places), together):
            some = slice(start, start + together)
            # Features first: what is looked for of one feature stands together.
            both = relevance.new_empty(2, relevance.shape[1], len(rows[some]))
            for measure, values in enumerate((relevance, activation)):
                both[measure] = values[rows[some]].T
            for measure in range(len(MEASURES)):
                self._keep(layer, measure, both, places[some])
                self._count(self.histogram[layer, measure], both[measure])
            for which, values in enumerate((*both, both[0].abs())):
                self._sum(layer, which, values)

    def _keep(self, layer: int, measure: int, both: torch.Tensor, places: torch.Tensor) -> None:
        """Merge both lists of a measure with its values, [F, N], in ``both[measure]``."""
        lists = slice(2 * measure, 2 * measure + 2)
        values = both[measure]
        features = len(values)
        kept = self.strongest[layer, lists]
        k = kept.shape[1]
        candidates = _candidates(values, kept, places)
        rows, columns = candidates.flatten(0, 1).nonzero().unbind(1)
        if not len(rows):
            return
        counts = candidates.sum(-1).flatten()
        # Of each candidate: how many of its list stand before it.
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        found = values[rows % features, columns].abs()
        keys = kept.new_zeros(2 * features, k + int(counts.max()))
        beside = self.beside.new_zeros(keys.shape)
        keys[:, :k] = kept.transpose(1, 2).reshape(-1, k)
        beside[:, :k] = self.beside[layer, lists].transpose(1, 2).reshape(-1, k)
        keys[rows, k + rank] = keys_of(found[:, None], places[columns])[:, 0]
        beside[rows, k + rank] = both[1 - measure][rows % features, columns]
        # All keys but those of 0, behind which nothing is beside, are different. Few as they are of
        # one list, sorting them all takes a GPU less time than looking for the largest.
        ordered, order = keys.sort(dim=1, descending=True)
        kept.copy_(ordered[:, :k].view(2, features, k).transpose(1, 2))
        chosen = beside.gather(1, order[:, :k]).view(2, features, k)
        self.beside[layer, lists] = chosen.transpose(1, 2)

    def _sum(self, layer: int, which: int, values: torch.Tensor) -> None:
        # In two parts of 2**-8 and of 2**-POINT, each exact in float32 and in the sum of float64.
        fine = values * 2.0**_COARSE
        coarse = fine.round()
        fine = fine.sub_(coarse).mul_(2.0 ** (POINT - _COARSE)).round_()
        low = self.low[layer, which] + fine.sum(-1, dtype=torch.float64).long()
        self.high[layer, which] += coarse.sum(-1, dtype=torch.float64).long() + (low >> 32)
        self.low[layer, which] = low & _LOW

    def _count(self, histogram: torch.Tensor, values: torch.Tensor) -> None:
        features = len(values)
        of_feature = torch.arange(0, features * CLASSES, CLASSES, device=values.device)
        flat = (classes_of(values) + of_feature[:, None].int()).flatten()
        found = torch.bincount(flat, minlength=features * CLASSES).view(features, CLASSES)
        histogram.index_add_(1, _all_bins(values.device), found.int())


def _candidates(values: torch.Tensor, kept: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return which values may be among the k strongest: all that are, and few others.

    From values, float32 [F, N], and the keys that are kept so far, int64 [2, k, F] of positive and
    of negative values, to bool [2, F, N].
    """
    weakest = kept[:, -1]
    bound = values_of(weakest)
    # Of equal values the earlier place is kept: here, mostly the one that is.
    stays = places_of(weakest) < places.min()
    bound = torch.where(stays, bound.nextafter(bound.new_full((), torch.inf)), bound)
    k, blocks = kept.shape[1], values.shape[-1] // _BLOCK
    if blocks >= k:
        # k blocks have a value that large, so the k-th largest of all is not smaller.
        by_block = values[:, : blocks * _BLOCK].reshape(-1, blocks, _BLOCK)
        largest = torch.stack((by_block.amax(-1), -by_block.amin(-1)))
        bound = bound.maximum(largest.topk(k, dim=-1).values[..., -1])
    positive, negative = bound[..., None]
    return torch.stack((values >= positive, values <= -negative))
