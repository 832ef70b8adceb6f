"""Linear layers on a CPU through oneDNN, in exact float32.

torch computes float32 products through MKL. oneDNN, which torch ships as well and takes for
bfloat16, needs a quarter to a third less time for the same products on the processor measured in
``tests/bench/README.md``. It reads torch's weights as they are, forward and transposed: weights
that are reordered once are up to a tenth faster still, but take their memory twice more.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from reltrace_worker.lrp.patching import instance_forwards

# Below both, what oneDNN does before it multiplies costs more than it saves.
_LEAST_WEIGHTS = 1 << 18
_LEAST_WORK = 1 << 24


def is_available() -> bool:
    """Whether this torch has oneDNN, with the operator that torch's own compiler calls."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pays(rows: int, weights: int) -> bool:
    """Whether a product of so many rows with a matrix of so many weights is large enough."""
    return weights >= _LEAST_WEIGHTS or rows * weights >= _LEAST_WORK


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; no gradient but that of x."""

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


def linear_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Run an ``nn.Linear``: its value and the gradient of its input, to float32 rounding.

    Parameters
    ----------
    module
        The layer; float32 on a CPU, no gradient for its parameters.
    x
        [..., in features].

    Returns
    -------
    torch.Tensor
        [..., out features].
    """
    weight, bias = module.weight, module.bias
    if not pays(x.numel() // x.shape[-1], weight.numel()):
        return linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


def linear_layers(model: nn.Module) -> tuple[nn.Linear, ...]:
    """Return the layers of a model that oneDNN can take; none where this torch does not have it."""
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
    """Let oneDNN compute the products of some layers until the block ends.

    Parameters
    ----------
    layers
        Of ``linear_layers``.
    """
    return instance_forwards(
        (layer, "forward", MethodType(linear_forward, layer)) for layer in layers
    )
