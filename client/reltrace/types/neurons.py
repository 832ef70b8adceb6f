"""The strongest neurons and heads of a trace, with their labels in an atlas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from reltrace.types.atlas_shard import SITES
from reltrace.types.errors import invalid
from reltrace.types.top_entries import Entry, columns, strongest

if TYPE_CHECKING:
    from reltrace.types.trace import Trace

_REDUCE = 'reduce="topk", "feature" or "full"'


@runtime_checkable
class Labels(Protocol):
    """Labels of neurons and heads, such as a `reltrace.Atlas`."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Properties; "made_by" has the name and revision of the labelled model."""
        ...

    def label(self, layer: int, index: int, site: str = "neuron") -> str:
        """Return the label of a neuron or head; "" if it has none."""
        ...


@dataclass(frozen=True, slots=True)
class StrongNeuron:
    """A neuron that is strong in a trace.

    Attributes
    ----------
    layer, neuron : int
        Number of the decoder layer, index in its MLP.
    position : int or None
        Index of the token; None where the reduction summed over the tokens ("feature").
    token : str or None
        That token.
    relevance : float
        Its relevance there, raw.
    label : str
        Its label in the atlas; "" without an atlas, or where it has no label.
    """

    layer: int
    neuron: int
    position: int | None
    token: str | None
    relevance: float
    label: str


@dataclass(frozen=True, slots=True)
class StrongHead:
    """An attention head that is strong in a trace.

    Attributes
    ----------
    layer, head : int
        Number of the decoder layer, index among its heads.
    position, token, relevance, label
        As in `StrongNeuron`.
    """

    layer: int
    head: int
    position: int | None
    token: str | None
    relevance: float
    label: str


Strong = TypeVar("Strong", StrongNeuron, StrongHead)


def strong(
    kind: type[Strong], trace: Trace, site: str, k: int, atlas: Labels | None
) -> list[Strong]:
    """Return the strongest neurons or heads. See `Trace.neurons`."""
    return [
        kind(*_layer_and_index(entry), entry.position, entry.token, entry.value, label)
        for entry, label in labelled(trace, site, k, atlas)
    ]


def labelled(trace: Trace, site: str, k: int, atlas: Labels | None) -> list[tuple[Entry, str]]:
    """Return the strongest entries of "neuron" or "head", each with its label.

    Raises
    ------
    InvalidArgument
        If the trace has no such site, `k` is not from 1 on, or the atlas is of another model.
    """
    if site not in trace.arrays:
        sites = f"there are {', '.join(trace.sites)}" if trace.sites else "no site was requested"
        raise invalid(
            "sites",
            f'{site!r} is not in the trace ({sites}); ask for sites=["{site}"] and {_REDUCE}',
        )
    if columns(trace, site, np.empty(0, int)).features is None:
        raise invalid(
            "reduce", f"{trace.provenance.reduction!r} summed over the {site}s; ask for {_REDUCE}"
        )
    labels = None if atlas is None else labels_of(trace, atlas)
    return [
        (entry, "" if labels is None else labels.label(*_layer_and_index(entry), site))
        for entry in strongest(trace, k, site)
    ]


def labels_of(trace: Trace, atlas: object) -> Labels:
    """Return the atlas; raise InvalidArgument if it is not of the model that was traced."""
    if not isinstance(atlas, Labels):
        raise invalid(
            "atlas", f"must be what reltrace.load_atlas returns, not {type(atlas).__name__}"
        )
    traced = [trace.provenance.model, trace.provenance.revision]
    made_by = list(atlas.about.get("made_by") or ())
    if made_by != traced:
        of = "@".join(made_by) if made_by else "no model: it is empty"
        raise invalid("atlas", f"is of {of}; the trace is of {'@'.join(traced)}")
    return atlas


def has_labels(site: str) -> bool:
    """Tell whether an atlas labels the features of a site."""
    return site in SITES


def _layer_and_index(entry: Entry) -> tuple[int, int]:
    assert entry.layer is not None
    assert entry.feature is not None
    return entry.layer, entry.feature
