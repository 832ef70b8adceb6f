"""Linear layers that read one tensor, computed as one product.

The weights of queries, keys and values, and those of gate and up projection, become views of one
matrix each, so that no weight is kept twice. Forward there is one product instead of three or two,
backward one, and no sums of their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_linear_layers(model: nn.Module) -> int:
    """Compute the layers of each group by one product, from now on; returns how many groups.

    Left alone are layers that are quantized, sharded or hooked, and those that train.
    """
    groups = list(_groups(model))
    for layers in groups:
        _Joined(layers)
    return len(groups)


def _groups(model: nn.Module) -> Iterator[list[nn.Linear]]:
    for module in model.modules():
        for names in _GROUPS:
            layers = [layer for name in names if (layer := getattr(module, name, None)) is not None]
            if len(layers) == len(names) and _can_join(layers):
                yield layers


def _can_join(layers: Sequence[Any]) -> bool:
    # Not subclasses: quantized layers are some, and compute something else.
    if any(type(layer) is not nn.Linear for layer in layers):
        return False
    kinds = {
        (layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None)
        for layer in layers
    }
    return len(kinds) == 1 and not any(
        "forward" in vars(layer)
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or type(layer.weight.data) is not torch.Tensor
        or any(parameter.requires_grad for parameter in layer.parameters())
        for layer in layers
    )


class _Joined:
    """The layers of one group. The first that is called computes for all."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._weight = self._share("weight")
        self._bias = None if layers[0].bias is None else self._share("bias")
        # The input of the first, and what the others have not fetched yet.
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            vars(layer)["forward"] = partial(self._forward, index)

    def _share(self, name: str) -> torch.Tensor:
        joined = torch.cat([getattr(layer, name).data for layer in self._layers])
        for layer, part in zip(self._layers, torch.split(joined, self._sizes), strict=True):
            getattr(layer, name).data = part
        return joined

    def _forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index == 0:
            self._input = x
            parts = _Product.apply(x, self._weight, self._bias, self._sizes)  # type: ignore[no-untyped-call]
            self._outputs = dict(enumerate(parts))
        elif x is not self._input or index not in self._outputs:
            return linear(x, self._layers[index].weight, self._layers[index].bias)
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class _Product(torch.autograd.Function):
    """x @ weight.T + bias in parts of the last dimension, with a gradient for x only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: list[int]
    ) -> tuple[torch.Tensor, ...]:
        ctx.sizes = sizes
        ctx.save_for_backward(weight)
        # Queries and keys may be constants to a rule: then no product is spent on them.
        ctx.set_materialize_grads(False)
        *parts, last = torch.split(linear(x, weight, bias), sizes, dim=-1)
        # Attention keeps values for the backward pass: as a view they would keep the queries and
        # keys alive that are rotated elsewhere. Of gate and up projection both are kept.
        return *parts, last.clone() if len(sizes) == 3 else last

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        if all(gradient is not None for gradient in outer):
            return _concatenated(outer) @ weight, None, None, None
        parts = [
            gradient @ part
            for gradient, part in zip(outer, torch.split(weight, ctx.sizes), strict=True)
            if gradient is not None
        ]
        return sum(parts[1:], start=parts[0]) if parts else None, None, None, None


def _concatenated(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate by the last dimension, without a copy where the parts lie side by side."""
    first = parts[0]
    shape = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
    strides = torch.empty(shape, device="meta").stride()
    offset = first.storage_offset()
    for part in parts:
        beside = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.storage_offset() == offset
            and part.stride() == strides
        )
        if not beside:
            return torch.cat(tuple(parts), dim=-1)
        offset += part.shape[-1]
    return first.as_strided(shape, strides)
