"""The sites: where in a model relevance is read. To add a site, add an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from reltrace_worker.models.families import Family
from reltrace_worker.models.loading import ModelShape
from reltrace_worker.models.sharding import HEADS, NEURONS


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A tensor inside a decoder layer: a module's first positional input, or its first output."""

    # Path of the module inside the layer; "" is the layer itself.
    path: str
    is_input: bool = False
    # The tensor also bypasses the module, as the residual stream does: edit it in place.
    in_place: bool = False

    @property
    def is_layer_output(self) -> bool:
        """The layer hands it to the next: its gradient needs no backward through the layer."""
        return self.path == "" and not self.is_input

    def register(
        self, layer: nn.Module, hook: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> RemovableHandle:
        """Call `hook` with the tensor in every forward pass; what it returns replaces it."""
        module = layer.get_submodule(self.path)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = hook(args[0])
            return None if changed is None else (changed, *args[1:])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            changed = hook(first_output(output))
            if changed is not None and isinstance(output, tuple):
                return (changed, *output[1:])
            return changed

        if self.is_input:
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)


def first_output(output: Any) -> torch.Tensor:
    """Return the tensor that a module gives, alone or first in a tuple."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _one_column(feature: int, _: ModelShape, __: int) -> range:
    return range(feature, feature + 1)


def _head_columns(head: int, shape: ModelShape, width: int) -> range:
    size = width // shape.heads
    return range(head * size, (head + 1) * size)


def _sum_per_head(relevance: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    return relevance.reshape(*relevance.shape[:-1], shape.heads, -1).sum(-1)


@dataclass(frozen=True, slots=True)
class Site:
    """One site."""

    name: str
    # F, the length of its feature axis.
    features: Callable[[ModelShape], int]
    # The tensor inside each decoder layer; None: the input embeddings, once per model.
    hook_point: Callable[[Family], HookPoint] | None
    # From the relevance of the tensor, float32 [N, width], to that of the features, [N, F].
    fold: Callable[[torch.Tensor, ModelShape], torch.Tensor] = lambda relevance, _: relevance
    # By what the tensor is divided among processes; empty: it is whole in each.
    axis: str = ""
    # From a feature and the tensor's width to the columns that the feature is made of.
    columns: Callable[[int, ModelShape, int], range] = _one_column

    @property
    def per_layer(self) -> bool:
        """The site's values have a layer axis."""
        return self.hook_point is not None


def _hidden(shape: ModelShape) -> int:
    return shape.hidden_size


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("embed", _hidden, None),
        Site("resid", _hidden, lambda _: HookPoint("")),
        Site(
            "resid_mid",
            _hidden,
            lambda family: HookPoint(family.mid_reader, is_input=True, in_place=True),
        ),
        Site("attn_out", _hidden, lambda family: HookPoint(family.attention_out)),
        Site("mlp_out", _hidden, lambda family: HookPoint(family.mlp_out)),
        Site(
            "head",
            lambda shape: shape.heads,
            lambda family: HookPoint(family.head_reader, is_input=True),
            _sum_per_head,
            HEADS,
            _head_columns,
        ),
        Site(
            "neuron",
            lambda shape: shape.intermediate_size,
            lambda family: HookPoint(family.neuron_reader, is_input=True),
            axis=NEURONS,
        ),
    )
}
