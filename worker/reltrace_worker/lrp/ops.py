"""The differentiable functions that LRP rules put in the place of a model's non-linear ones.

In a gradient-times-input framework a rule is a changed backward pass. LXT composes it of general
building blocks, each of which reads and keeps whole tensors; here one autograd function keeps only
what its backward pass reads. AttnLRP: Achtibat et al., ICML 2024; CP-LRP: Ali et al., ICML 2022.
Tests compare every function with LXT's in value and gradient.

They differ from LXT on purpose in one point: LXT's identity rule divides by ``x + 1e-10``, which
gives 0 at x = 0 and -inf at x = -1e-10. For the activations of ``RATIOS``, f(x) / x is known in
closed form and finite everywhere: for SiLU it is sigmoid(x), 1/2 at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from reltrace_worker.types.errors import ModelError

Activation = Callable[[torch.Tensor], torch.Tensor]

_compiled = False


@cache
def _program(function: Callable[..., Any]) -> Callable[..., Any]:
    # One program for packs of every length.
    return torch.compile(function, dynamic=True)


def is_compiled() -> bool:
    """Whether the functions of this process are compiled."""
    return _compiled


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of plain tensors that :func:`compile_functions` compiles: one kernel each."""

    @wraps(function)
    def run(*args: Any) -> Any:
        if not _compiled:
            return function(*args)
        # Called where nothing is recorded. For torch's compiler, tensors that require a gradient
        # would need a second program.
        return _program(function)(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))

    return run


def compile_functions(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the element-wise functions of this process with ``torch.compile``, from now on.

    Modules, hooks, linear layers and attention stay as they are, so that every site works as
    without. Compiled functions round in other places than torch's own, which tests bound.

    Raises
    ------
    ModelError
        torch can not compile on this machine.
    """
    global _compiled
    hidden = torch.ones((1, 2, 8), dtype=dtype, device=device)
    _compiled = True
    try:
        _norm_forward(hidden, hidden[0, 0], 1e-6)
    except Exception as error:
        _compiled = False
        needed = "Triton" if device.type == "cuda" else "a C++ compiler"
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"torch can not compile on {device}, where it needs {needed}: "
            + (reason[0] if reason else type(error).__name__)
        ) from error


def _gelu_tanh_ratio(x: torch.Tensor) -> torch.Tensor:
    """Return gelu_tanh(x) / x = (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    # (1 + tanh(u)) / 2 = sigmoid(2 u): no difference of nearly equal numbers at large -x.
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))


def _gelu_ratio(x: torch.Tensor) -> torch.Tensor:
    """Return gelu(x) / x = Phi(x), the distribution function of the normal distribution."""
    ratio: torch.Tensor = torch.special.ndtr(x)
    return ratio


RATIOS: dict[str, tuple[Activation, Activation]] = {
    "silu": (silu, torch.sigmoid),
    "gelu_tanh": (partial(gelu, approximate="tanh"), _gelu_tanh_ratio),
    "gelu": (gelu, _gelu_ratio),
}
"""Activations f and their ratios f(x) / x."""

_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}


def activation_name(function: nn.Module) -> str | None:
    """Return the name in ``RATIOS`` of a model's activation; None where its ratio is not known."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _NAMES.get(type(function).__name__)


class _ScaleGradients(torch.autograd.Function):
    """Tensors as they are, their gradients multiplied by one factor each."""

    @staticmethod
    def forward(
        ctx: Any, factors: tuple[float, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.factors = factors
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Any, ...]:
        return None, *(
            gradient * factor for gradient, factor in zip(outer, ctx.factors, strict=True)
        )


def scale_gradients(factors: tuple[float, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors`, whose gradients are multiplied by `factors`."""
    scaled: tuple[torch.Tensor, ...] = _ScaleGradients.apply(factors, *tensors)  # type: ignore[no-untyped-call]
    return scaled


class _IdentityRule(torch.autograd.Function):
    """act(x) with the gradient act(x) / x: lxt's ``identity_rule_implicit``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        value = activation(x)
        ctx.save_for_backward(value / (x + 1e-10))
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return ratio * outer[0], None


@elementwise
def _gated_forward(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    return RATIOS[name][0](gate).mul_(up)


@elementwise
def _joined_gated_backward(
    outer: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, name: str
) -> torch.Tensor:
    common = RATIOS[name][1](gate) * outer * 0.5
    # Side by side, as the output of a joined projection is (``joined.py``).
    return torch.cat((common * up, common * gate), dim=-1)


def _gated_backward(
    outer: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    # d/d gate = ratio * up / 2 and d/d up = ratio * gate / 2: the activation is not needed.
    common = RATIOS[name][1](gate).mul_(outer).mul_(0.5)
    return common * up, common.mul_(gate)


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up: identity rule on the activation, uniform rule on the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        value: torch.Tensor = _gated_forward(gate, up, name)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        if _compiled:
            both: torch.Tensor = _joined_gated_backward(outer[0], gate, up, ctx.name)
            for_gate, for_up = both.chunk(2, dim=-1)
        else:
            for_gate, for_up = _gated_backward(outer[0], gate, up, ctx.name)
        return for_gate, for_up, None


def attnlrp_gated_product(
    activation: nn.Module, gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """Return act(gate) * up under AttnLRP: identity rule and uniform rule."""
    name = activation_name(activation)
    product: torch.Tensor
    if name is None:
        (product,) = scale_gradients((0.5,), _IdentityRule.apply(gate, activation) * up)  # type: ignore[no-untyped-call]
    else:
        product = _GatedProduct.apply(gate, up, name)  # type: ignore[no-untyped-call]
    return product


def cp_gated_product(activation: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return act(gate) * up, with the gate held constant."""
    factor: torch.Tensor = activation(gate.detach())
    return factor * up


@elementwise
def _norm_forward(
    x: torch.Tensor, scale: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = x.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * inverse).to(scale.dtype).mul_(scale).to(x.dtype), inverse


@elementwise
def _norm_backward(outer: torch.Tensor, inverse: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (outer * scale).float().mul_(inverse).to(outer.dtype)


class _Norm(torch.autograd.Function):
    """An RMS norm whose inverse is held constant: keeps one number per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
        value: torch.Tensor
        value, inverse = _norm_forward(x, scale, epsilon)
        ctx.save_for_backward(inverse, scale)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None]:
        return _norm_backward(outer[0], *ctx.saved_tensors), None, None


def rms_norm(x: torch.Tensor, scale: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalize with the root mean square held constant (identity rule).

    Parameters
    ----------
    x
        [..., width], in the model's dtype.
    scale
        [width]; takes no gradient. The product with it is computed in its dtype: in the model's
        one, the normalized values are rounded before it, in float32 the product is.
    epsilon
        Added to the mean square.
    """
    return _Norm.apply(x, scale, epsilon)  # type: ignore[no-any-return,no-untyped-call]
