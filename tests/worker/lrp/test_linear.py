"""Linear layers through oneDNN: the numbers of plain ones, for as long as a block lasts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.loaded import Checkpoints
from reltrace_worker.engine import Engine
from reltrace_worker.lrp import linear
from reltrace_worker.lrp.patching import instance_forward
from reltrace_worker.models import load_model
from reltrace_worker.types.jobs import (
    Target,
    Term,
    TokenizedPrompt,
    TraceJob,
)
from reltrace_worker.types.results import JobResult
from torch import nn

needs_onednn = pytest.mark.skipif(
    not linear.is_available(), reason="this torch has no oneDNN with mkldnn._linear_pointwise"
)


def layer(inner: int, outer: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inner, outer, bias=bias).requires_grad_(False)


def value_and_gradient(
    module: nn.Linear, x: torch.Tensor, outer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    value = module(x)
    (gradient,) = torch.autograd.grad(value, x, outer)
    return value.detach(), gradient


@needs_onednn
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    inner=st.integers(1, 600),
    outer=st.integers(1, 600),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradient_are_those_of_the_plain_layer(
    rows: int, inner: int, outer: int, bias: bool, strided: bool, seed: int
) -> None:
    """
    Given a linear layer of any size, and input and gradient of any layout
    If oneDNN computes it
    I expect value and gradient of float64 to float32 rounding, as close as torch's own come.
    """
    torch.manual_seed(seed)
    module = layer(inner, outer, bias)
    x, g = torch.randn(1, rows, inner), torch.randn(1, rows, outer)
    if strided:
        x, g = x.mT.contiguous().mT, g.mT.contiguous().mT
    exact = value_and_gradient(copy.deepcopy(module).double(), x.double(), g.double())
    with linear.through_onednn([module]):
        ours = value_and_gradient(module, x, g)
    for found, wanted, depth in zip(ours, exact, (inner, outer), strict=True):
        assert found.dtype == torch.float32
        # Rounding of a sum of `depth` products of normal numbers.
        assert float((found - wanted).abs().max()) <= 1e-6 * (4 + depth**0.5)


@pytest.mark.parametrize("faster", [True, False])
def test_only_large_frozen_float32_layers_are_taken_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    class Quantized(nn.Linear):
        pass

    monkeypatch.setattr(linear, "onednn_is_faster", lambda: faster)
    model = nn.Sequential(
        layer(512, 512),
        layer(512, 512).bfloat16(),
        Quantized(512, 512).requires_grad_(False),
        nn.Linear(512, 512),
        layer(512, 511),
        layer(512, 512, bias=True),
    )
    model[0].weight.requires_grad_(True)
    assert linear.linear_layers(model) == ((model[5],) if faster else ())


def test_nothing_is_timed_for_a_model_without_large_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: pytest.fail("timed"))
    assert linear.linear_layers(nn.Sequential(layer(512, 511), layer(512, 512).bfloat16())) == ()


@needs_onednn
@pytest.mark.parametrize(("seconds", "faster"), [(0.92, True), (0.94, False), (1.1, False)])
def test_the_choice_is_made_once_by_the_time_of_both(
    monkeypatch: pytest.MonkeyPatch, seconds: float, faster: bool
) -> None:
    """
    Given a clock that says what the products of either library take, and two rounds of eleven that
    another program disturbs
    If the process chooses
    I expect oneDNN where it takes at most 93 % of the time, every call of it on one thread, and
    nothing to be timed a second time.
    """
    now, calls = 0.0, 0
    product, plain = linear._product, linear.linear

    def onednn(*args: Any) -> torch.Tensor:
        nonlocal now, calls
        assert torch.get_num_threads() == 1
        calls += 1
        # Two products are one reading; of the third and the fourth the clock runs on.
        now += seconds / 2 if calls not in (5, 7) else 40.0
        return product(*args)

    def torchs(*args: Any) -> torch.Tensor:
        nonlocal now
        now += 1.0
        return plain(*args)

    monkeypatch.setattr(linear, "_product", onednn)
    monkeypatch.setattr(linear, "linear", torchs)
    monkeypatch.setattr(linear.time, "thread_time", lambda: now)
    threads = torch.get_num_threads()
    linear.onednn_is_faster.cache_clear()
    try:
        assert linear.onednn_is_faster() is faster
        timed = calls
        assert linear.onednn_is_faster() is faster
    finally:
        linear.onednn_is_faster.cache_clear()
    assert calls == timed == 2 * (1 + linear._ROUNDS)
    assert torch.get_num_threads() == threads


def test_layers_come_back_also_after_an_exception() -> None:
    module = layer(4, 4)
    before = dict(vars(module))
    with pytest.raises(KeyError, match="True"), linear.through_onednn([module, module]):
        raise KeyError("forward" in vars(module))
    assert vars(module) == before


def test_a_forward_that_a_rule_has_replaced_stays() -> None:
    module = layer(4, 4)
    with instance_forward(module, lambda x: x + 1), linear.through_onednn([module]):
        assert module(torch.tensor(1)) == 2


@needs_onednn
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_trace_through_onednn_is_the_trace(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    """
    Given a model, every site, and several prompts
    If oneDNN computes all of its products
    I expect the relevance that torch's own give, to 1e-5 of the largest of the layer.
    """
    loaded = load_model(str(checkpoints.folder("grouped")), device="cpu")
    sites = ("embed", "resid", "resid_mid", "attn_out", "mlp_out", "head", "neuron")
    jobs = [
        TraceJob(TokenizedPrompt(ids, ("",) * len(ids)), (Target((term,)),), sites, "full")
        for ids in ((3, 1, 4, 1, 5), (9, 2, 6), tuple(range(40)))
        for term in (Term(len(ids) - 1, 7),)
    ]
    monkeypatch.setattr(linear, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    plain = Engine(loaded, checkpointing).run(jobs)  # type: ignore[arg-type]
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    engine = Engine(loaded, checkpointing)  # type: ignore[arg-type]
    products: list[int] = []
    product = linear._product
    monkeypatch.setattr(linear, "_product", lambda *a: products.append(1) or product(*a))
    for ours, wanted in zip(engine.run(jobs), plain, strict=True):
        assert isinstance(ours, JobResult)
        assert isinstance(wanted, JobResult)
        for found, expected in zip(ours.tensors, wanted.tensors, strict=True):
            assert found.site == expected.site
            assert torch.allclose(
                found.values,
                expected.values,
                rtol=0,
                atol=1e-5 * float(expected.values.abs().max()),
            )
    # Seven products per layer and the logits, forward and backward.
    assert len(products) >= 2 * (7 * loaded.shape.layers + 1)
