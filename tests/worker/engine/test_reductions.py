"""The reductions of many jobs in one go against their definitions, job by job in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace_worker.engine.reductions import REDUCTIONS, JobRows, Sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
LENGTHS = st.lists(st.one_of(st.integers(1, 70), st.sampled_from([128, 700])), min_size=1)


def reduced(name: str, relevance: torch.Tensor, lengths: list[int], k: int = 0) -> list[Any]:
    """Return the parts of each job."""
    starts = [0, *accumulate(lengths)]
    jobs = [JobRows(i, *rows) for i, rows in enumerate(pairwise(starts))]
    sizes = Sizes(len(relevance), len(jobs), relevance.shape[1], k)
    reduction = REDUCTIONS[name]
    values = relevance.sum(-1) if reduction.by_row else relevance
    parts = reduction.prepare(jobs, sizes, CPU)(values)
    assert [part.dtype for part in parts] == [dtype for _, dtype in reduction.parts]
    assert {tuple(part.shape) for part in parts} == {reduction.shape(sizes)}
    return [[reduction.select(part[None], job, sizes)[0] for part in parts] for job in jobs]


def random(rows: int, features: int = 12) -> torch.Tensor:
    """Return values of very different sizes, many of which cancel, and many of which are equal."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, features, generator=generator)
    return (values * 10).round() / 10 * torch.randint(-3, 4, (rows, 1), generator=generator).exp2()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS)
def test_feature_is_the_sum_over_the_tokens_of_each_job(lengths: list[int]) -> None:
    """As exact as a sum of 128 numbers after another, over the sum of their sizes."""
    relevance = random(sum(lengths))
    found = reduced("feature", relevance, lengths)
    for (values,), own in zip(found, relevance.double().split(lengths), strict=True):
        error = (values.double() - own.sum(0)).abs()
        assert bool((error <= 128 * 2.0**-24 * own.abs().sum(0)).all())


@pytest.mark.parametrize("length", [63, 64, 65, 4096, 4097, 20_000])
def test_a_long_prompt_is_summed_up_as_exactly(length: int) -> None:
    """Added up one after another, 20,000 numbers of one sign are off by 20 times as much."""
    relevance = torch.rand(length + 3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    found = reduced("feature", relevance, [2, length, 1])
    wanted = relevance.double().split([2, length, 1])
    for (values,), own in zip(found, wanted, strict=True):
        total = own.sum(0)
        assert float(((values.double() - total).abs() / total).max()) < 1e-6


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS, k=st.sampled_from([1, 5, 30, 1000]))
def test_topk_is_the_largest_of_each_job(lengths: list[int], k: int) -> None:
    relevance = random(sum(lengths))
    found = reduced("topk", relevance, lengths, k)
    for (values, tokens, features), own in zip(found, relevance.split(lengths), strict=True):
        count = min(k, own.numel())
        assert values.shape == (count,)
        assert torch.equal(own[tokens.long(), features.long()], values)
        assert len(set(zip(tokens.tolist(), features.tolist(), strict=True))) == count
        largest = own.abs().flatten().sort(descending=True).values[:count]
        assert torch.equal(values.abs(), largest)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("job", [0, 2, 4])
def test_what_is_not_finite_stays_in_its_job(name: str, wrong: float, job: int) -> None:
    """
    Given jobs of similar lengths, one of which is not finite in its last or first row
    If they are reduced together
    I expect the others' numbers, and that it shows in its own.
    """
    lengths = [6, 7, 7, 8, 70]
    relevance = random(sum(lengths))
    k = 100 if name == "topk" else 0
    wanted = reduced(name, relevance, lengths, k)
    start = sum(lengths[:job])
    for row in (start, start + lengths[job] - 1):
        relevance[row, 3] = wrong
    found = reduced(name, relevance, lengths, k)
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if index == job:
            assert not bool(ours[0].isfinite().all())
        else:
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() for t in tensors)])
        return found


@pytest.mark.parametrize("name", ["feature", "topk"])
def test_a_long_prompt_beside_many_short_ones_takes_no_more_memory(name: str) -> None:
    lengths = [4000, *([9] * 300)]
    relevance = random(sum(lengths), 64)
    with LargestTensor() as mode:
        reduced(name, relevance, lengths, 10 if name == "topk" else 0)
    assert mode.largest <= 1.25 * relevance.nbytes
