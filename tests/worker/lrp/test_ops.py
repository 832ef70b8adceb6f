"""The functions of the rules against lxt's own, in value and gradient."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace_worker.lrp import RULES, ops
from reltrace_worker.lrp.lxt_rules import import_lxt
from reltrace_worker.models import FAMILIES
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

lxt = import_lxt("patches")

# Of each rule lxt's gated MLP.
MLPS = {"attnlrp": lxt.gated_mlp_forward, "cp_lrp": lxt.cp_gated_mlp_forward}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
quick = settings(max_examples=20, deadline=None, database=None, derandomize=True)


def forward(rule: str, kind: type[nn.Module]) -> Any:
    """The function that replaces the forward of a class."""
    name, function = RULES[rule].patches[kind]
    assert name == "forward"
    return function


def value_and_gradient(
    function: Any, module: Any, hidden: torch.Tensor, outer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    value = function(module, hidden)
    (gradient,) = torch.autograd.grad(value, hidden, outer)
    return value.detach(), gradient


def assert_close(ours: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    assert ours.dtype == wanted.dtype
    ours, wanted = ours.double(), wanted.double()
    assert float((ours - wanted).abs().max()) <= relative * float(wanted.abs().max())


def mlp(activation: str, hidden: int, inner: int, dtype: torch.dtype) -> Any:
    module = nn.Module()
    module.gate_proj = nn.Linear(hidden, inner, bias=False)
    module.up_proj = nn.Linear(hidden, inner, bias=False)
    module.down_proj = nn.Linear(inner, hidden, bias=False)
    module.act_fn = ACT2FN[activation]
    return module.to(dtype).requires_grad_(False)


@quick
@given(
    rows=st.integers(1, 9),
    inner=st.integers(1, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    rule=st.sampled_from(sorted(MLPS)),
    seed=st.integers(0, 99),
)
def test_the_gated_mlp_is_lxts(
    rows: int, inner: int, activation: str, rule: str, seed: int
) -> None:
    torch.manual_seed(seed)
    module = mlp(activation, 12, inner, torch.float32)
    hidden, outer = torch.randn(2, rows, 12), torch.randn(2, rows, 12)
    ours = value_and_gradient(forward(rule, LlamaMLP), module, 3 * hidden, outer)
    wanted = value_and_gradient(MLPS[rule], module, 3 * hidden, outer)
    for left, right in zip(ours, wanted, strict=True):
        assert_close(left, right, 3e-6)


@quick
@given(rows=st.integers(1, 9), width=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_norm_is_lxts(rows: int, width: int, scale: float) -> None:
    torch.manual_seed(rows)
    weight = nn.Parameter(torch.rand(width) + 0.5, requires_grad=False)
    module = SimpleNamespace(weight=weight, variance_epsilon=1e-6)
    hidden, outer = scale * torch.randn(1, rows, width), torch.randn(1, rows, width)
    ours = value_and_gradient(forward("attnlrp", LlamaRMSNorm), module, hidden, outer)
    wanted = value_and_gradient(lxt.rms_norm_forward, module, hidden, outer)
    for left, right in zip(ours, wanted, strict=True):
        assert_close(left, right, 1e-6)


def test_the_attention_wrapper_is_lxts() -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3)]

    def attention(_: Any, query: Any, key: Any, value: Any, *, dropout: float, scale: float) -> Any:
        assert dropout == 0.0
        return torch.softmax(scale * query @ key.transpose(-1, -2), -1) @ value

    outputs = [
        wrap(attention)(None, *states, dropout=0.0, scale=0.3)
        for wrap in (RULES["attnlrp"].wrap_attention, lxt.wrap_attention_forward)
    ]
    assert torch.equal(*outputs)
    ours, wanted = (torch.autograd.grad(o, states, torch.ones_like(o)) for o in outputs)
    for left, right in zip(ours, wanted, strict=True):
        # Division by a power of two is exact.
        assert torch.equal(left, right)


@pytest.mark.parametrize("rule", MLPS)
def test_bfloat16_is_no_further_from_exact_than_lxts(rule: str) -> None:
    torch.manual_seed(1)
    module = mlp("silu", 64, 128, torch.bfloat16)
    hidden, outer = torch.randn(2, 64, 64).bfloat16().chunk(2)
    reference = mlp("silu", 64, 128, torch.float64)
    reference.load_state_dict(module.state_dict())
    exact = value_and_gradient(MLPS[rule], reference, hidden.double(), outer.double())
    ours = value_and_gradient(forward(rule, LlamaMLP), module, hidden, outer)
    theirs = value_and_gradient(MLPS[rule], module, hidden, outer)
    for mine, other, wanted in zip(ours, theirs, exact, strict=True):
        error, limit = (float((t.double() - wanted).norm()) for t in (mine, other))
        assert mine.dtype == torch.bfloat16
        assert error <= 1.1 * limit


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_ratio_is_exact_where_lxt_divides_by_nothing(activation: str) -> None:
    """
    Given x = 0, where lxt's ratio f(x) / (x + 1e-10) is 0, and x = -1e-10, where it is not finite
    If the gated product's gradient is taken
    I expect the limit of f(x) / x, which is 1/2.
    """
    function, name = ACT2FN[activation], ACTIVATIONS[activation]
    assert ops.activation_name(function) == name
    gate = torch.tensor([0.0, -1e-10, 1e-10, -30.0, 30.0], requires_grad=True)
    up = torch.full((5,), 4.0, requires_grad=True)
    ours, into_up = torch.autograd.grad(
        ops.attnlrp_gated_product(function, gate, up), (gate, up), torch.ones(5)
    )
    # Uniform rule: half of ratio * up.
    assert ours[:3].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert ours[4].item() == pytest.approx(2.0)
    assert 0.0 <= ours[3].item() < 1e-11
    assert into_up.tolist() == pytest.approx((function(gate.detach()) / 2).tolist())

    def both(_: Any, x: torch.Tensor) -> torch.Tensor:
        module = SimpleNamespace(
            gate_proj=lambda t: t, up_proj=lambda t: 4.0 + 0.0 * t, down_proj=lambda t: t,
            act_fn=function,
        )  # fmt: skip
        return lxt.gated_mlp_forward(module, x)

    _, theirs = value_and_gradient(both, None, gate.detach(), torch.ones(5))
    assert theirs[0].item() == 0.0
    assert not theirs[1].isfinite()
    assert theirs[4].item() == pytest.approx(ours[4].item())


def test_an_activation_without_a_known_ratio_has_lxts_bits() -> None:
    torch.manual_seed(2)
    module = mlp("relu", 6, 9, torch.float32)
    assert ops.activation_name(module.act_fn) is None
    hidden, outer = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    ours = value_and_gradient(forward("attnlrp", LlamaMLP), module, hidden, outer)
    wanted = value_and_gradient(lxt.gated_mlp_forward, module, hidden, outer)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])


def kept_bytes(function: Any, module: Any, hidden: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        # Weights live anyway.
        if not isinstance(tensor, nn.Parameter) and tensor.shape[:-1] == hidden.shape[:-1]:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = function(module, hidden.clone().requires_grad_())
    del value
    return sum(kept.values())


def test_what_is_kept_for_the_backward() -> None:
    """Two factors instead of lxt's three and more; of the norm one number per row."""
    torch.manual_seed(3)
    module, hidden = mlp("silu", 16, 32, torch.float32), torch.randn(1, 10, 16)
    product = 10 * 32 * 4
    assert kept_bytes(forward("attnlrp", LlamaMLP), module, hidden) == 2 * product
    assert kept_bytes(lxt.gated_mlp_forward, module, hidden) > 2 * product
    norm = SimpleNamespace(weight=nn.Parameter(torch.ones(16), False), variance_epsilon=1e-6)
    assert kept_bytes(forward("attnlrp", LlamaRMSNorm), norm, hidden) == 10 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_gemmas_norm_is_lxts(dtype: torch.dtype, scale: float) -> None:
    """
    Given a norm whose `_norm` lxt has patched, as its map for Gemma 3 does
    If the same input passes through our forward
    I expect the same values, gradients, and the values of the norm as it was.
    """
    generator = torch.Generator().manual_seed(0)
    norm = Gemma3RMSNorm(16).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    x = (torch.randn(3, 5, 16, generator=generator) * scale).to(dtype).requires_grad_()
    start = torch.randn(3, 5, 16, generator=generator).to(dtype)
    plain = norm(x)
    norm._norm = MethodType(import_lxt("models.gemma3").gemma3_norm, norm)
    theirs = norm(x)
    ours = forward("attnlrp", Gemma3RMSNorm)(norm, x)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, plain)
    (gradient,) = torch.autograd.grad(ours, x, start)
    assert torch.equal(gradient, torch.autograd.grad(theirs, x, start)[0])
    assert not torch.allclose(gradient, torch.autograd.grad(plain, x, start)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_round_where_the_families_own_round(family: str, dtype: torch.dtype) -> None:
    """
    Given a norm of a family
    If the rule's function takes its place
    I expect the same bits, and a gradient that scales, without the derivative of the root.
    """
    generator = torch.Generator().manual_seed(0)
    kind = FAMILIES[family].norm
    norm = kind(16)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(16, generator=generator) + 0.5)
    norm.to(dtype).requires_grad_(False)
    x = (3 * torch.randn(7, 16, generator=generator)).to(dtype).requires_grad_()
    ours = forward("attnlrp", kind)(norm, x)
    assert torch.equal(ours, norm(x))
    (gradient,) = torch.autograd.grad(ours, x, torch.ones_like(ours))
    # A function that is linear when its statistics are held: R = x * gradient is its value.
    assert_close(x.detach() * gradient, ours.detach(), 1e-6 if dtype == torch.float32 else 2e-2)
