"""The sites: where in a model relevance is read. To add a site, add an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from reltrace_worker.models.families import Family
from reltrace_worker.models.loading import ModelShape


class Side(Enum):
    """Which tensor of a module."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor inside a decoder layer.

    Parameters
    ----------
    path
        Path of the module inside the layer; "" is the layer itself.
    side
        Its first positional input or its (first) output.
    passes_by
        The tensor is the residual stream itself, which goes on beside the module too: who changes
        it changes it in place.
    """

    path: str
    side: Side
    passes_by: bool = False

    @property
    def is_layer_output(self) -> bool:
        """The tensor is what the layer hands to the next: its gradient needs no pass through it."""
        return self.path == "" and self.side is Side.OUTPUT

    def module(self, layer: nn.Module) -> nn.Module:
        """Return the tapped module of one decoder layer."""
        return layer.get_submodule(self.path)


def _as_it_is(relevance: torch.Tensor, _: ModelShape) -> torch.Tensor:
    return relevance


def _itself(feature: int, _: ModelShape, __: int) -> range:
    return range(feature, feature + 1)


def _of_head(head: int, shape: ModelShape, width: int) -> range:
    size = width // shape.heads
    return range(head * size, (head + 1) * size)


def _per_head(relevance: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    return relevance.reshape(*relevance.shape[:-1], shape.heads, -1).sum(-1)


@dataclass(frozen=True, slots=True)
class Site:
    """One site.

    Parameters
    ----------
    name
        As jobs name it.
    features
        F, the length of its feature axis.
    tap
        The tensor inside each decoder layer; None: the input embeddings, once per model.
    fold
        From the relevance of the tensor, float32 [N, its width], to that of the site, [N, F].
    columns
        From a feature, and the tensor's width, to the columns of the tensor that it is made of.
    """

    name: str
    features: Callable[[ModelShape], int]
    tap: Callable[[Family], Tap] | None
    fold: Callable[[torch.Tensor, ModelShape], torch.Tensor] = _as_it_is
    columns: Callable[[int, ModelShape, int], range] = _itself

    @property
    def per_layer(self) -> bool:
        """The site's values have a layer axis."""
        return self.tap is not None


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("embed", lambda shape: shape.hidden_size, None),
        Site("resid", lambda shape: shape.hidden_size, lambda _: Tap("", Side.OUTPUT)),
        Site(
            "resid_mid",
            lambda shape: shape.hidden_size,
            lambda family: Tap(family.mid_reader, Side.INPUT, passes_by=True),
        ),
        Site(
            "attn_out",
            lambda shape: shape.hidden_size,
            lambda family: Tap(family.attention_out, Side.OUTPUT),
        ),
        Site(
            "mlp_out",
            lambda shape: shape.hidden_size,
            lambda family: Tap(family.mlp_out, Side.OUTPUT),
        ),
        Site(
            "head",
            lambda shape: shape.heads,
            lambda family: Tap(family.head_reader, Side.INPUT),
            _per_head,
            _of_head,
        ),
        Site(
            "neuron",
            lambda shape: shape.intermediate_size,
            lambda family: Tap(family.neuron_reader, Side.INPUT),
        ),
    )
}
