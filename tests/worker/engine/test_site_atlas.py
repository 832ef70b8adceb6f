"""The strongest places of the features of a site: against sorting by hand, in whatever parts."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.strongest import by_hand, listed, sums
from reltrace_worker.engine.site_atlas import (
    BINS,
    LISTS,
    OCTAVES,
    POINT,
    SiteAtlas,
    bins_of,
    classes_of,
    keys_of,
    places_of,
    values_of,
)

CPU = torch.device("cpu")


def rows(seed: int, count: int, features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    # Few different values: ties are many.
    relevance = torch.randn(count, features).mul(4).round().div(4)
    activation = torch.randn(count, features)
    return relevance, activation, torch.randperm(1 << 20)[:count]


def test_a_key_holds_value_and_place() -> None:
    values = torch.tensor([[1.5, -2.0], [0.0, 3e-39], [float(2**30), 1e-30]])
    places = torch.tensor([7, 0, (1 << 32) - 1])
    keys = keys_of(values, places)
    assert torch.equal(values_of(keys), values.clamp(min=0))
    assert places_of(keys).tolist() == [[7, -1], [-1, 0], [(1 << 32) - 1, (1 << 32) - 1]]


def test_the_strongest_places_are_those_that_sorting_finds() -> None:
    atlas = SiteAtlas.empty(2, 5, 4, CPU)
    relevance, activation, places = rows(1, 700, 5)
    atlas.add(1, relevance, activation, torch.arange(len(places)), places)
    for which, values in zip(LISTS, (relevance, -relevance, activation, -activation), strict=True):
        assert listed(atlas, 1, which) == by_hand(values, places, 4)
        assert listed(atlas, 0, which) == [[]] * 5


def test_beside_a_place_is_the_other_measure_there() -> None:
    atlas = SiteAtlas.empty(1, 5, 4, CPU)
    relevance, activation, places = rows(4, 700, 5)
    # Few places are left for the last feature's negative relevance: the rest stays empty.
    relevance[2:, 4] = relevance[2:, 4].abs()
    atlas.add(0, relevance, activation, torch.arange(len(places)), places)
    at = {int(place): index for index, place in enumerate(places)}
    for which, other in zip(LISTS, (activation, activation, relevance, relevance), strict=True):
        for feature, found in enumerate(listed(atlas, 0, which)):
            expected = [float(other[at[place], feature]) for _, place in found]
            beside = atlas.beside[0, LISTS.index(which), :, feature].tolist()
            assert beside == expected + [0.0] * (4 - len(found))


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_parts_in_any_order_give_the_same_bits(seed: int, cuts: list[int], order: object) -> None:
    relevance, activation, places = rows(seed, 300, 3)
    whole = SiteAtlas.empty(1, 3, 5, CPU)
    whole.add(0, relevance, activation, torch.arange(len(places)), places)
    edges = sorted({0, 300, *cuts})
    parts = list(pairwise(edges))
    order.shuffle(parts)  # type: ignore[attr-defined]
    pieces = SiteAtlas.empty(1, 3, 5, CPU)
    for start, stop in parts:
        part = slice(start, stop)
        pieces.add(0, relevance, activation, torch.arange(300)[part], places[part])
    assert torch.equal(pieces.strongest, whole.strongest)
    assert torch.equal(pieces.beside, whole.beside)
    assert torch.equal(pieces.high, whole.high)
    assert torch.equal(pieces.low, whole.low)
    assert torch.equal(pieces.histogram, whole.histogram)


def test_fewer_places_than_k_leave_the_rest_empty() -> None:
    atlas = SiteAtlas.empty(1, 1, 4, CPU)
    values, every = torch.tensor([[2.0], [-1.0]]), torch.arange(2)
    atlas.add(0, values, torch.zeros(2, 1), every, torch.tensor([5, 6]))
    assert listed(atlas, 0, "relevance+") == [[(2.0, 5)]]
    assert listed(atlas, 0, "relevance-") == [[(1.0, 6)]]
    assert listed(atlas, 0, "activation+") == [[]]


def test_sums_and_histograms_count_every_value() -> None:
    atlas = SiteAtlas.empty(1, 4, 2, CPU)
    relevance, activation, places = rows(3, 1000, 4)
    atlas.add(0, relevance, activation, torch.arange(len(places)), places)
    expected = [values.double().sum(0) for values in (relevance, activation, relevance.abs())]
    torch.testing.assert_close(sums(atlas)[0], torch.stack(expected), rtol=0, atol=1e-9)
    assert (atlas.histogram[0].sum(-1) == 1000).all()


def test_sums_stay_exact_beyond_what_64_bits_hold() -> None:
    """
    Given activations whose sum, in the units in which sums are kept, has more than 64 bits
    I expect it to be exact: 3,000 tokens of 4,000,000 are more than 2**63 units of 2**-40.
    """
    atlas = SiteAtlas.empty(1, 1, 1, CPU)
    values = torch.full((3000, 1), 4_000_000.0)
    atlas.add(0, -values, values, torch.arange(3000), torch.arange(3000))
    exact = 3000 * 4_000_000 << POINT
    assert exact.bit_length() > 64
    for which, sign in enumerate((-1, 1, 1)):
        high, low = int(atlas.high[0, which, 0]), int(atlas.low[0, which, 0])
        assert (high << 32) + low == sign * exact


def test_a_bin_is_an_octave() -> None:
    zero = len(OCTAVES)
    low, high = 2.0**OCTAVES.start, 2.0**OCTAVES.stop
    cases = {
        0.0: zero,
        low * 0.99: zero,
        low: zero + 1,
        1.0: zero + 1 - OCTAVES.start,
        1.99: zero + 1 - OCTAVES.start,
        2.0: zero + 2 - OCTAVES.start,
        high * 100: BINS - 1,
        -low: zero - 1,
        -1.0: zero - 1 + OCTAVES.start,
        -high * 100: 0,
    }
    assert bins_of(classes_of(torch.tensor(list(cases)))).tolist() == list(cases.values())
