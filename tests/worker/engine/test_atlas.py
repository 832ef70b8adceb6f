"""The atlas of a slice: against sorting by hand, and the same however prompts are packed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import Engine
from reltrace_worker.engine.atlas import (
    BINS,
    LISTS,
    OCTAVES,
    PASS_TOKENS,
    POINT,
    SiteAtlas,
    Slice,
    bins_of,
    classes_of,
    keys_of,
    places_of,
    values_of,
)
from reltrace_worker.errors import EngineError
from reltrace_worker.jobs import JobSpec, PreparedCorpus, PreparedJob

CPU = torch.device("cpu")


def rows(seed: int, count: int, features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    # Few different values: ties are many.
    relevance = torch.randn(count, features).mul(4).round().div(4)
    activation = torch.randn(count, features)
    return relevance, activation, torch.randperm(1 << 20)[:count]


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


def test_a_key_holds_value_and_place() -> None:
    values = torch.tensor([[1.5, -2.0], [0.0, 3e-39], [float(2**30), 1e-30]])
    places = torch.tensor([7, 0, (1 << 32) - 1])
    keys = keys_of(values, places)
    assert torch.equal(values_of(keys), values.clamp(min=0))
    assert places_of(keys).tolist() == [[7, -1], [-1, 0], [(1 << 32) - 1, (1 << 32) - 1]]


def test_the_strongest_places_are_those_that_sorting_finds() -> None:
    atlas = SiteAtlas.empty(2, 5, 4, CPU)
    relevance, activation, places = rows(1, 700, 5)
    atlas.add(1, relevance, activation, places)
    for which, values in zip(LISTS, (relevance, -relevance, activation, -activation), strict=True):
        assert listed(atlas, 1, which) == by_hand(values, places, 4)
        assert listed(atlas, 0, which) == [[]] * 5


def test_beside_a_place_is_the_other_measure_there() -> None:
    atlas = SiteAtlas.empty(1, 5, 4, CPU)
    relevance, activation, places = rows(4, 700, 5)
    # Few places are left for the last feature's negative relevance: the rest stays empty.
    relevance[2:, 4] = relevance[2:, 4].abs()
    atlas.add(0, relevance, activation, places)
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
    whole.add(0, relevance, activation, places)
    edges = sorted({0, 300, *cuts})
    parts = list(pairwise(edges))
    order.shuffle(parts)  # type: ignore[attr-defined]
    pieces = SiteAtlas.empty(1, 3, 5, CPU)
    for start, stop in parts:
        part = slice(start, stop)
        pieces.add(0, relevance[part], activation[part], places[part])
    assert torch.equal(pieces.strongest, whole.strongest)
    assert torch.equal(pieces.beside, whole.beside)
    assert torch.equal(pieces.high, whole.high)
    assert torch.equal(pieces.low, whole.low)
    assert torch.equal(pieces.histogram, whole.histogram)


def test_fewer_places_than_k_leave_the_rest_empty() -> None:
    atlas = SiteAtlas.empty(1, 1, 4, CPU)
    atlas.add(0, torch.tensor([[2.0], [-1.0]]), torch.zeros(2, 1), torch.tensor([5, 6]))
    assert listed(atlas, 0, "relevance+") == [[(2.0, 5)]]
    assert listed(atlas, 0, "relevance-") == [[(1.0, 6)]]
    assert listed(atlas, 0, "activation+") == [[]]


def test_sums_and_histograms_count_every_value() -> None:
    atlas = SiteAtlas.empty(1, 4, 2, CPU)
    relevance, activation, places = rows(3, 1000, 4)
    atlas.add(0, relevance, activation, places)
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
    atlas.add(0, -values, values, torch.arange(3000))
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


def corpus(prompts: list[PreparedJob], first: int = 0, k: int = 3) -> PreparedCorpus:
    return PreparedCorpus(tuple(prompts), tuple(range(first, first + len(prompts))), (), k)


def made(engine: Engine, of: PreparedCorpus) -> Slice:
    atlas = engine.begin_atlas(of)
    while not atlas.over:
        engine.add_to(atlas)
    return atlas


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_slice_is_what_its_full_traces_say(checkpoints: Checkpoints, checkpointing: str) -> None:
    """
    Given prompts of several lengths, in one pass
    I expect every list to be the strongest places of the prompts' full traces, bit for bit.
    """
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, checkpointing)  # type: ignore[arg-type]
    prompts = prepare(loaded, *(JobSpec(prompt) for prompt in PROMPTS))
    atlas = made(engine, corpus(prompts))
    for site in ("neuron", "head"):
        full = [JobSpec(p, sites=(site,), reduction="full") for p in PROMPTS]
        traces = [result.tensors[0].values for result in run(engine, prepare(loaded, *full))]
        places = torch.cat(
            [(number << 16) + torch.arange(trace.shape[1]) for number, trace in enumerate(traces)]
        )
        every = torch.cat(traces, 1)
        for layer in range(loaded.shape.layers):
            for which, sign in (("relevance+", 1), ("relevance-", -1)):
                expected = by_hand(sign * every[layer], places, 3)
                assert listed(atlas.atlas[site], layer, which) == expected
        torch.testing.assert_close(
            sums(atlas.atlas[site])[:, 0].cpu(),
            every.double().sum(1),
            rtol=1e-6,
            atol=1e-9,
        )


def test_activations_are_those_that_hooks_see(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    prompts = prepare(loaded, *(JobSpec(prompt) for prompt in PROMPTS))
    atlas = made(Engine(loaded, "off"), corpus(prompts, k=1))
    seen: dict[str, list[torch.Tensor]] = {"neuron": [], "head": []}
    layer = loaded.model.model.layers[2]
    handles = [
        module.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0][0]))
        for module, own in (
            (layer.mlp.down_proj, seen["neuron"]),
            (layer.self_attn.o_proj, seen["head"]),
        )
    ]
    with torch.no_grad():
        for job in prompts:
            loaded.model(torch.tensor([job.token_ids], device=loaded.device))
    for handle in handles:
        handle.remove()
    neurons = torch.cat(seen["neuron"])
    heads = torch.cat(seen["head"]).unflatten(-1, (loaded.shape.heads, -1)).norm(dim=-1)
    for site, values in (("neuron", neurons), ("head", heads)):
        strongest = values_of(atlas.atlas[site].strongest[2, 2, 0])
        torch.testing.assert_close(
            strongest, values.max(0).values.clamp(min=0), rtol=1e-4, atol=1e-5
        )
    assert not atlas.atlas["head"].strongest[:, 3].any()


def test_passes_do_not_depend_on_memory_or_workers(checkpoints: Checkpoints) -> None:
    """
    Given a corpus of several passes
    If it is made in one slice, and by another engine in slices that end where passes do
    I expect the same bits, once the slices are merged.
    """
    loaded = checkpoints.loaded("grouped")
    torch.manual_seed(5)
    long = [
        JobSpec(tuple(torch.randint(10, 200, (int(n),)).tolist()))
        for n in torch.randint(40, 120, (60,))
    ]
    prompts = prepare(loaded, *long)
    whole = made(Engine(loaded, "off"), corpus(prompts))
    passes = engine_passes(prompts)
    assert len(passes) > 1
    other = Engine(loaded, "on")
    parts = [made(other, corpus(prompts[p[0] : p[-1] + 1], first=p[0])) for p in passes]
    for site, atlas in whole.atlas.items():
        keys = torch.cat([part.atlas[site].strongest for part in reversed(parts)], 2)
        assert torch.equal(keys.topk(3, dim=2).values, atlas.strongest)
        torch.testing.assert_close(
            sum(sums(part.atlas[site]) for part in parts), sums(atlas), rtol=0, atol=0
        )
        assert torch.equal(sum(part.atlas[site].histogram for part in parts), atlas.histogram)


def engine_passes(prompts: list[PreparedJob]) -> list[list[int]]:
    """Cut prompts as the page says: in their order, up to so many tokens."""
    passes: list[list[int]] = [[]]
    for index, job in enumerate(prompts):
        held = sum(len(prompts[i].token_ids) for i in passes[-1])
        if passes[-1] and held + len(job.token_ids) > PASS_TOKENS:
            passes.append([])
        passes[-1].append(index)
    return passes


def test_a_slice_says_which_tokens_it_has(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    prompts = prepare(loaded, JobSpec(PROMPTS[0]), JobSpec(PROMPTS[3]))
    of = PreparedCorpus(tuple(prompts), (0, 2), ((1, "is empty"),), 2)
    engine = Engine(loaded, "off")
    parts = {(t.site, t.part): t.values for t in made(engine, of).tensors()}
    lengths = [len(job.token_ids) for job in prompts]
    assert parts["corpus", "lengths"].tolist() == [lengths[0], 0, lengths[1]]
    assert parts["corpus", "token_ids"].tolist() == [i for job in prompts for i in job.token_ids]
    explained = [result.targets[0].token_id for result in run(engine, prompts)]
    assert parts["corpus", "targets"].tolist() == [explained[0], -1, explained[1]]
    assert set(parts) == {
        *(("corpus", part) for part in ("lengths", "token_ids", "targets")),
        *(
            (site, part)
            for site in ("neuron", "head")
            for part in ("strongest", "beside", "high", "low", "histogram")
        ),
    }


def test_what_nobody_waits_for_goes_on_no_more(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    atlas = Engine(loaded, "off").begin_atlas(corpus(prepare(loaded, JobSpec(PROMPTS[0]))))
    atlas.drop()
    assert atlas.over


def test_numbers_that_are_not_finite_are_an_error(checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("grouped")
    engine = Engine(loaded, "off")
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(EngineError, match="is not finite, or too large for an atlas"):
            made(engine, corpus(prepare(loaded, JobSpec(PROMPTS[0]))))
    finally:
        with torch.no_grad():
            weight[0, 0] = before
