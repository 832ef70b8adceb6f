"""LXT's rules as single autograd functions: the same values and gradients, fewer passes and bytes.

lxt writes its rules with general building blocks, each of which walks over its tensor and keeps
something of it. Here each rule is one ``torch.autograd.Function`` that keeps only what its
backward reads. AttnLRP: Achtibat et al., ICML 2024; CP-LRP: Ali et al., ICML 2022. Tests compare
every function with lxt's in value and gradient.

They differ from lxt in one point, on purpose: lxt's identity rule divides by ``x + 1e-10``, which
gives 0 at x = 0 and -inf at x = -1e-10. For the activations named in ``RATIOS`` the ratio
f(x) / x is known in closed form and finite everywhere: for SiLU it is sigmoid(x), 1/2 at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from reltrace_worker.lrp import lxt_functions as lxt

Ratio = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh_ratio(x: torch.Tensor) -> torch.Tensor:
    """Return gelu_tanh(x) / x = (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    # (1 + tanh(u)) / 2 = sigmoid(2 u): no difference of nearly equal numbers at large -x.
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))


def _gelu_ratio(x: torch.Tensor) -> torch.Tensor:
    """Return gelu(x) / x = Phi(x), the distribution function of the normal distribution."""
    share: torch.Tensor = torch.special.ndtr(x)
    return share


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


_SILU, _GELU_TANH, _GELU = "silu", "gelu_tanh", "gelu"
RATIOS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Ratio]] = {
    _SILU: (silu, torch.sigmoid),
    _GELU_TANH: (_gelu_tanh, _gelu_tanh_ratio),
    _GELU: (gelu, _gelu_ratio),
}
"""Activations f and their ratios f(x) / x."""


def activation_name(function: nn.Module) -> str | None:
    """Return the name in ``RATIOS`` of a model's activation; None where its ratio is not known."""
    kind = type(function).__name__
    if isinstance(function, nn.SiLU) or kind == "SiLUActivation":
        return _SILU
    if isinstance(function, nn.GELU):
        return _GELU_TANH if function.approximate == "tanh" else _GELU
    if kind in ("GELUTanh", "PytorchGELUTanh"):
        return _GELU_TANH
    if kind == "GELUActivation":
        return _GELU
    return None


@dataclass(frozen=True, slots=True)
class Kernels:
    """What an autograd function computes: on plain tensors, so that it can be compiled.

    Parameters
    ----------
    forward, backward
        From the inputs, and from the outer gradient and what was kept.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _gated_forward(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    return RATIOS[name][0](gate).mul_(up)


def _gated_backward(
    outer: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    # d/d gate = ratio * up / 2 and d/d up = ratio * gate / 2: the activation is not needed.
    common = RATIOS[name][1](gate).mul_(outer).mul_(0.5)
    return common * up, common.mul_(gate)


GATED_PRODUCT = Kernels(_gated_forward, _gated_backward)


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up under AttnLRP: identity rule on act, uniform rule on the product."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, name: str, kernels: Kernels
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name, ctx.kernels = name, kernels
        return kernels.forward(gate, up, name)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Any, ...]:
        return (*ctx.kernels.backward(outer[0], *ctx.saved_tensors, ctx.name), None, None)


class _GateStopped(torch.autograd.Function):
    """factor * up, of which nothing flows into the factor: keeps the factor alone."""

    @staticmethod
    def forward(ctx: Any, factor: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return factor * up

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[None, torch.Tensor]:
        (factor,) = ctx.saved_tensors
        return None, outer[0] * factor


def gated_product(
    gate: torch.Tensor, up: torch.Tensor, name: str, kernels: Kernels = GATED_PRODUCT
) -> torch.Tensor:
    """Return act(gate) * up with the gradients of AttnLRP.

    Parameters
    ----------
    gate, up
        The two projections, of one shape.
    name
        The activation, one of ``RATIOS``.
    kernels
        ``GATED_PRODUCT``, or what it compiles to.
    """
    return _GatedProduct.apply(gate, up, name, kernels)  # type: ignore[no-any-return,no-untyped-call]


def gated_mlp_forward(
    module: Any, hidden: torch.Tensor, kernels: Kernels = GATED_PRODUCT
) -> torch.Tensor:
    """Run a gated MLP under AttnLRP: lxt's ``gated_mlp_forward``.

    An activation whose ratio is not known takes lxt's own function.
    """
    name = activation_name(module.act_fn)
    if name is None:
        return lxt.gated_mlp_forward(module, hidden)  # type: ignore[no-any-return]
    weighted = gated_product(module.gate_proj(hidden), module.up_proj(hidden), name, kernels)
    return module.down_proj(weighted)  # type: ignore[no-any-return]


def cp_gated_mlp_forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Run a gated MLP under CP-LRP: lxt's ``cp_gated_mlp_forward``."""
    with torch.no_grad():
        factor = module.act_fn(module.gate_proj(hidden))
    return module.down_proj(_GateStopped.apply(factor, module.up_proj(hidden)))  # type: ignore[no-any-return,no-untyped-call]


def _rms_forward(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = hidden.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    # Rounded to the model's dtype before the weight, as the model itself does.
    return (exact * inverse).to(hidden.dtype).mul_(weight), inverse


def _rms_backward(outer: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (outer * weight).float().mul_(inverse).to(outer.dtype)


RMS_NORM = Kernels(_rms_forward, _rms_backward)


class _Norm(torch.autograd.Function):
    """A norm whose inverse is a constant: keeps one number per row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Kernels
    ) -> Any:
        value, inverse = kernels.forward(hidden, weight, epsilon)
        ctx.save_for_backward(inverse, weight)
        ctx.kernels = kernels
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None, None]:
        return ctx.kernels.backward(outer[0], *ctx.saved_tensors), None, None, None


def normalize(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Kernels = RMS_NORM
) -> torch.Tensor:
    """Normalize under the identity rule: the gradient passes as if the inverse norm were fixed.

    Parameters
    ----------
    hidden
        [..., width], in the model's dtype.
    weight
        [width], in the model's dtype; takes no gradient.
    epsilon
        Added to the mean square.
    kernels
        ``RMS_NORM`` or those of another norm, or what they compile to.
    """
    return _Norm.apply(hidden, weight, epsilon, kernels)  # type: ignore[no-any-return,no-untyped-call]


def rms_norm_forward(
    module: Any, hidden: torch.Tensor, kernels: Kernels = RMS_NORM
) -> torch.Tensor:
    """Run a LLaMA RMSNorm under the identity rule: lxt's ``rms_norm_forward``."""
    return normalize(hidden, module.weight, module.variance_epsilon, kernels)


class _DivideGradients(torch.autograd.Function):
    """Query, key and value as they are, their gradients divided by 4, 4 and 2 in place."""

    @staticmethod
    def forward(ctx: Any, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(state.view_as(state) for state in states)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Any, ...]:
        query, key, value = outer
        return query * 0.25, key * 0.25, value * 0.5


def wrap_attention_forward(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention kernel for AttnLRP: lxt's ``wrap_attention_forward``."""

    def forward(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        states = _DivideGradients.apply(query, key, value)  # type: ignore[no-untyped-call]
        return attention(module, *states, *args, **{**kwargs, "dropout": 0.0})

    return forward
