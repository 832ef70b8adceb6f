"""The merged results of slices for one site: exact in any order of the slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import SUMS

_LOW = (1 << 32) - 1
_TOKEN_BITS = 16
POINT = 40
OCTAVES = range(-24, 8)
"""Bins of |x|: those of negative x first, from the largest |x| on, then one for smaller |x|, then
those of positive x."""


@dataclass(eq=False)
class MergedSite:
    values: Array  # float32 [L, 4, k, F]: |x| of the strongest examples, by `LISTS`; 0: none
    beside: Array  # float32 [L, 4, k, F]: the activation in lists of relevance, and the reverse
    prompts: Array  # int64 [L, 4, k, F]: number of the prompt in the corpus; -1: none
    tokens: Array  # int32 [L, 4, k, F]: position of the token; -1: none
    high: Array  # int64 [L, 3, F]: sums in units of 2**-40 are high * 2**32 + low
    low: Array
    histogram: Array  # int64 [L, 2, F, bins]

    @classmethod
    def empty(cls, strongest: tuple[int, ...], bins: int) -> MergedSite:
        layers, _, _, features = strongest
        return cls(
            values=np.zeros(strongest, np.float32),
            beside=np.zeros(strongest, np.float32),
            prompts=np.full(strongest, -1, np.int64),
            tokens=np.full(strongest, -1, np.int32),
            high=np.zeros((layers, len(SUMS), features), np.int64),
            low=np.zeros((layers, len(SUMS), features), np.int64),
            histogram=np.zeros((layers, 2, features, bins), np.int64),
        )

    def add(self, slice_: Mapping[str, Array], first: int) -> None:
        """Add the arrays of `AtlasShard` for a slice whose first prompt has the number `first`."""
        for layer in range(len(self.values)):
            # One at a time: of a large model the temporary arrays are gigabytes.
            self._keep(layer, slice_["strongest"][layer], slice_["beside"][layer], first)
        low = self.low + slice_["low"]
        self.high += slice_["high"] + (low >> 32)
        self.low = low & _LOW
        self.histogram += slice_["histogram"]

    def _keep(self, layer: int, keys: Array, beside: Array, first: int) -> None:
        exists = keys > 0
        example = _LOW - (keys & _LOW)
        new = (
            np.where(exists, keys >> 32, 0).astype(np.int32).view(np.float32),
            np.where(exists, first + (example >> _TOKEN_BITS), -1),
            np.where(exists, example & ((1 << _TOKEN_BITS) - 1), -1).astype(np.int32),
            beside,
        )
        kept = (self.values, self.prompts, self.tokens, self.beside)
        columns = [np.concatenate((k[layer], n), axis=1) for k, n in zip(kept, new, strict=True)]
        # The strongest first; of equal ones the earliest in the corpus.
        order = np.lexsort((columns[2], columns[1], -columns[0]), axis=1)
        order = order[:, : self.values.shape[2]]
        for array, column in zip(kept, columns, strict=True):
            array[layer] = np.take_along_axis(column, order, axis=1)

    def sums(self) -> Array:
        """Return the sums, float64 [L, 3, F], in the order of `SUMS`."""
        total = self.high.astype(np.float64) * 2.0**32 + self.low
        result: Array = total / 2.0**POINT
        return result


def quantile(histogram: Array, share: float) -> float:
    """Return the value below which a share of a histogram lies, interpolated in its bin.

    int64 [bins]; 0 for the bin of values smaller than 2**-24, nan for an empty histogram.
    """
    total = int(histogram.sum())
    if not total:
        return float("nan")
    through = np.cumsum(histogram)
    # A share of 0 is the first bin that is not empty.
    bin_ = int(np.searchsorted(through, max(share * total, 1e-9), side="left"))
    zero = len(OCTAVES)
    if bin_ == zero:
        return 0.0
    before = int(through[bin_] - histogram[bin_])
    inside = (share * total - before) / int(histogram[bin_])
    octave = OCTAVES[abs(bin_ - zero) - 1]
    small, large = 2.0**octave, 2.0 ** (octave + 1)
    if bin_ > zero:
        return float(small * (large / small) ** inside)
    return -float(large * (small / large) ** inside)
