"""Changes of activations in the forward pass: neurons set or scaled, directions added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace.types.checks import number, whole_number
from reltrace.types.errors import invalid

_INDICES = (0, 2**32 - 1)
_POSITIONS = (-(2**31), 2**31 - 1)
# A norm squares activations, which have to stay within float32.
_LARGEST_VALUE = 1e9
_CHANGES = ("value", "scale", "direction", "mean")


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of activations at a site, made in every forward pass of a job.

    Exactly one of `value`, `scale`, `direction` and `mean` is given.

    Attributes
    ----------
    site : str
        "neuron", "resid", "embed", "head", or another site that the model's workers serve.
    layer : int
        Decoder layer, counted from 0; 0 for "embed".
    features : int or sequence of int, optional
        Indices of the neurons, heads or dimensions that are changed; default: all.
    positions : int or sequence of int, optional
        Positions of the tokens at which they are changed, from the end of the prompt if negative;
        default: all, including generated tokens.
    value : float, optional
        Set them to this value, -1e9 to 1e9; for a head, all values of its output.
    scale : float, optional
        Multiply them by this; 0 switches them off.
    direction : array of float, optional
        Add this vector, which has one value per feature of the site; not for "head".
    mean : True, optional
        Set to the mean of the input embeddings over the vocabulary; only for "embed", all features.

    Raises
    ------
    InvalidArgument
        If an attribute is wrong; the message names it and what is allowed.
    """

    site: str
    layer: int = 0
    features: int | Sequence[int] | None = None
    positions: int | Sequence[int] | None = None
    value: float | None = None
    scale: float | None = None
    direction: Any = None
    mean: bool | None = None

    def __post_init__(self) -> None:
        self.to_wire()

    def to_wire(self) -> types_pb2.Edit:
        """Translate the edit."""
        if not isinstance(self.site, str) or not self.site:
            raise invalid("site", f"must be the name of a site, not {self.site!r}")
        wire = types_pb2.Edit(
            site=self.site,
            layer=whole_number(self.layer, "layer", *_INDICES),
            features=_numbers(self.features, "features", *_INDICES),
            positions=_numbers(self.positions, "positions", *_POSITIONS),
        )
        given = [name for name in _CHANGES if getattr(self, name) is not None]
        if len(given) != 1:
            raise invalid(
                "value",
                f"give one of value, scale, direction and mean, not {' and '.join(given) or 0}",
            )
        (change,) = given
        if change in ("value", "scale"):
            setattr(wire, change, finite(getattr(self, change), change))
            return wire
        if change == "direction":
            wire.direction = _vector(self.direction)
        else:
            if self.mean is not True or self.site != "embed":
                raise invalid("mean", 'must be True, and the site "embed"')
            wire.mean = True
        if wire.features:
            raise invalid("features", f"is not for a {change}, which has a value for every one")
        return wire


@dataclass(frozen=True, eq=False)
class Steer:
    """A neuron that is set or scaled, or a direction that is added to the residual stream.

    Attributes
    ----------
    layer : int
        Decoder layer, counted from 0.
    neuron : int, optional
        Index of the neuron in the layer's MLP.
    value : float, optional
        Set the neuron to this.
    scale : float, optional
        Multiply the neuron by this (0 switches it off), or `direction` before it is added.
    direction : array of float, optional
        Vector that is added to the output of the layer, instead of a neuron that is changed.
    positions : int or sequence of int, optional
        As in `Edit`.

    Raises
    ------
    InvalidArgument
        If an attribute is wrong; the message names it and what is allowed.
    """

    layer: int
    neuron: int | None = None
    value: float | None = None
    scale: float | None = None
    direction: Any = None
    positions: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.edit()

    def edit(self) -> Edit:
        """Return the equivalent edit."""
        if (self.neuron is None) == (self.direction is None):
            raise invalid("neuron", "give either a neuron or a direction")
        if self.neuron is not None:
            neuron = whole_number(self.neuron, "neuron", *_INDICES)
            return Edit(
                "neuron", self.layer, neuron, self.positions, value=self.value, scale=self.scale
            )
        if self.value is not None:
            raise invalid("value", "is for a neuron; a direction is multiplied by scale")
        factor = 1.0 if self.scale is None else finite(self.scale, "scale")
        vector = np.frombuffer(_vector(self.direction), "<f4") * np.float32(factor)
        return Edit("resid", self.layer, positions=self.positions, direction=vector)


EditLike: TypeAlias = Edit | Steer


def edits_to_wire(edits: object, argument: str = "edits") -> list[types_pb2.Edit]:
    """Translate the edits of a job."""
    if isinstance(edits, Edit | Steer):
        edits = (edits,)
    if isinstance(edits, str) or not isinstance(edits, Sequence):
        raise invalid(argument, f"must be a sequence of Edit or Steer, not {edits!r}")
    wire = []
    for index, edit in enumerate(edits):
        if not isinstance(edit, Edit | Steer):
            raise invalid(
                f"{argument}[{index}]", f"must be an Edit or a Steer, not {type(edit).__name__}"
            )
        wire.append((edit.edit() if isinstance(edit, Steer) else edit).to_wire())
    return wire


def _numbers(value: object, argument: str, least: int, most: int) -> list[int]:
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, int | np.integer):
        value = (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise invalid(argument, f"must be a number or a sequence of them, not {value!r}")
    if not value:
        raise invalid(argument, "is empty; leave it out for all")
    return [
        whole_number(one, f"{argument}[{index}]", least, most) for index, one in enumerate(value)
    ]


def finite(value: object, argument: str) -> float:
    """Return a number that is in the range of edits."""
    return number(value, argument, -_LARGEST_VALUE, _LARGEST_VALUE)


def _vector(value: object) -> bytes:
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise invalid("direction", f"must be a vector of numbers: {error}") from None
    if vector.ndim != 1 or not len(vector):
        raise invalid("direction", f"must be a vector, not an array of shape {vector.shape}")
    if not (np.abs(vector) <= _LARGEST_VALUE).all():
        raise invalid("direction", f"must be {-_LARGEST_VALUE:g} to {_LARGEST_VALUE:g} throughout")
    return vector.astype("<f4").tobytes()
