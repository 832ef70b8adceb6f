"""Linear layers on a CPU through oneDNN, in float32.

torch computes float32 products through MKL. oneDNN, which torch ships as well and uses for
bfloat16, took a quarter to a third less time for the same products on the processor of
``tests/bench/README.md``. It reads torch's weights as they are, forward and transposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from reltrace_worker.lrp.patching import patched

# Below both, oneDNN's overhead per call is larger than what it saves.
_LEAST_WEIGHTS = 1 << 18
_LEAST_WORK = 1 << 24


def is_available() -> bool:
    """Whether this torch has oneDNN, with the operator that torch's own compiler calls."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, with a gradient for x only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(outer[0], weight.t(), None), None, None


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight, bias = module.weight, module.bias
    work = x.numel() // x.shape[-1] * weight.numel()
    if weight.numel() < _LEAST_WEIGHTS and work < _LEAST_WORK:
        return linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


def linear_layers(model: nn.Module) -> tuple[nn.Linear, ...]:
    """Return the layers that oneDNN can compute: frozen, float32, on a CPU."""
    if not is_available():
        return ()
    return tuple(
        module
        for module in model.modules()
        # Not subclasses: quantized layers are some, and compute something else.
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def through_onednn(layers: Iterable[nn.Linear]) -> AbstractContextManager[None]:
    """Compute the products of `linear_layers` by oneDNN until the block ends.

    A layer whose forward a rule has replaced keeps that.
    """
    free = (layer for layer in layers if "forward" not in vars(layer))
    return patched((layer, "forward", MethodType(_forward, layer)) for layer in free)
