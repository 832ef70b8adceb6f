"""Slices put together: exact, in whatever order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace.atlas.merged import OCTAVES, MergedSite, quantile

K, FEATURES, BINS = 3, 4, 2 * len(OCTAVES) + 1


def keys(pairs: list[tuple[float, int, int]]) -> np.ndarray:
    """Keys of one list of one feature, as a worker writes them: value, prompt, token."""
    row = np.zeros((1, 4, K, 1), np.int64)
    ordered = sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:K]
    for place, (value, prompt, token) in enumerate(ordered):
        bits = int(np.float32(value).view(np.int32))
        row[0, 0, place, 0] = (bits << 32) | (0xFFFFFFFF - ((prompt << 16) | token))
    return row


def slice_of(strongest: np.ndarray, sums: int = 0) -> dict[str, np.ndarray]:
    """A slice with these lists; all of its sums are the same."""
    values = (strongest >> 32).astype(np.int32).view(np.float32)
    token = (0xFFFFFFFF - (strongest & 0xFFFFFFFF)) & 0xFFFF
    return {
        "strongest": strongest,
        "beside": np.where(strongest > 0, beside(values, token), 0).astype(np.float32),
        "high": np.full((1, 3, 1), sums >> 32, np.int64),
        "low": np.full((1, 3, 1), sums & 0xFFFFFFFF, np.int64),
        "histogram": np.zeros((1, 2, 1, BINS), np.int32),
    }


def beside(value: Any, token: Any) -> Any:
    """What is beside a place tells it from others."""
    return 100 * value + token


def merged(slices: list[tuple[int, list[tuple[float, int, int]]]]) -> MergedSite:
    whole = MergedSite.empty((1, 4, K, 1), BINS)
    for first, pairs in slices:
        whole.add(slice_of(keys(pairs)), first)
    return whole


def listed(whole: MergedSite) -> list[tuple[float, int, int]]:
    rows = (whole.values[0, 0, :, 0], whole.prompts[0, 0, :, 0], whole.tokens[0, 0, :, 0])
    return [row for row in zip(*(r.tolist() for r in rows), strict=True) if row[1] >= 0]


PLACES = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.25]), st.integers(0, 9), st.integers(0, 3)),
    max_size=8,
    unique_by=lambda place: place[1:],
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(parts=st.lists(PLACES, min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_the_order_of_slices_does_not_matter(parts: list, order: object) -> None:
    slices = [(10 * number, part) for number, part in enumerate(parts)]
    every = [(v, first + p, t) for first, part in slices for v, p, t in part]
    expected = sorted(every, key=lambda place: (-place[0], place[1], place[2]))[:K]
    order.shuffle(slices)  # type: ignore[attr-defined]
    whole = merged(slices)
    assert listed(whole) == expected
    assert whole.beside[0, 0, : len(expected), 0].tolist() == [beside(v, t) for v, _, t in expected]
    assert not whole.beside[0, 0, len(expected) :].any()


def test_sums_stay_exact_beyond_what_64_bits_hold() -> None:
    whole = MergedSite.empty((1, 4, 1, 1), BINS)
    nothing = np.zeros((1, 4, 1, 1), np.int64)
    parts = [2**62 + 12345] * 40 + [-(2**61) - 77]
    for part in parts:
        whole.add(slice_of(nothing, sums=part), 0)
    assert int(whole.high[0, 0, 0]) * 2**32 + int(whole.low[0, 0, 0]) == sum(parts)
    assert 0 <= whole.low[0, 0, 0] < 2**32
    assert whole.sums()[0, 0, 0] == pytest.approx(sum(parts) / 2**40)


def test_quantiles_are_within_their_octave() -> None:
    histogram = np.zeros(BINS, np.int64)
    zero = len(OCTAVES)
    # Ten values in [-2, -1), thirty that are nothing, sixty in [1, 2).
    histogram[zero - (1 - OCTAVES.start)] = 10
    histogram[zero] = 30
    histogram[zero + (1 - OCTAVES.start)] = 60
    assert quantile(histogram, 0.0) == -2
    assert -2 < quantile(histogram, 0.05) < -1
    assert quantile(histogram, 0.3) == 0
    assert 1 < quantile(histogram, 0.7) < 2
    assert quantile(histogram, 1.0) == 2
    assert np.isnan(quantile(np.zeros(BINS, np.int64), 0.5))
