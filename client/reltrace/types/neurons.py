"""The strongest neurons and heads of a trace, with what an atlas calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from reltrace.types.atlas_shard import SITES
from reltrace.types.errors import invalid
from reltrace.types.top_entries import Entry, places, strongest
from reltrace.types.trace import Trace


@runtime_checkable
class Labels(Protocol):
    """What is needed of an atlas: `reltrace.Atlas` has it, and so may labels from elsewhere."""

    @property
    def about(self) -> Mapping[str, Any]:
        """With "made_by": name and revision of the model whose neurons and heads are labelled."""
        ...

    def label(self, layer: int, index: int, site: str = "neuron") -> str:
        """Return what a neuron or head is called; "" where it has no label."""
        ...


@dataclass(frozen=True, slots=True)
class StrongNeuron:
    """A neuron that is strong in a trace.

    Attributes
    ----------
    layer, neuron : int
        Which: number of the decoder layer, index in its MLP.
    position : int or None
        Index of the token; None where the reduction summed over the tokens ("feature").
    token : str or None
        That token.
    relevance : float
        Its relevance there, raw.
    label : str
        What the atlas calls it; "" without an atlas, or where it has no label.
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
        Which: number of the decoder layer, index among its heads.
    position : int or None
        Index of the token; None where the reduction summed over the tokens ("feature").
    token : str or None
        That token.
    relevance : float
        Its relevance there, raw.
    label : str
        What the atlas calls it; "" without an atlas, or where it has no label.
    """

    layer: int
    head: int
    position: int | None
    token: str | None
    relevance: float
    label: str


def strong_neurons(trace: Trace, k: int, atlas: Labels | None) -> list[StrongNeuron]:
    """Return the strongest neurons. See `Trace.neurons`."""
    return [
        StrongNeuron(*_which(entry), entry.position, entry.token, entry.value, label)
        for entry, label in labelled(trace, "neuron", k, atlas)
    ]


def strong_heads(trace: Trace, k: int, atlas: Labels | None) -> list[StrongHead]:
    """Return the strongest heads. See `Trace.heads`."""
    return [
        StrongHead(*_which(entry), entry.position, entry.token, entry.value, label)
        for entry, label in labelled(trace, "head", k, atlas)
    ]


def labelled(trace: Trace, site: str, k: int, atlas: Labels | None) -> list[tuple[Entry, str]]:
    """Return the strongest entries of "neuron" or "head", each with its label.

    Raises
    ------
    InvalidArgument
        The trace has none, `k` is no number of them, or the atlas is not of its model.
    """
    if site not in trace.arrays:
        there = f"there are {', '.join(trace.sites)}" if trace.sites else "no site was requested"
        raise invalid("sites", f'{site!r} is not in the trace ({there}); ask for sites=["{site}"] '
                      f"and {_REDUCE}")  # fmt: skip
    if not keeps_features(trace, site):
        raise invalid(
            "reduce", f"{trace.provenance.reduction!r} summed over the {site}s; ask for {_REDUCE}"
        )
    labels = None if atlas is None else labels_of(trace, atlas)
    return [
        (entry, "" if labels is None else labels.label(*_which(entry), site))
        for entry in strongest(trace, k, site)
    ]


_REDUCE = 'reduce="topk", "feature" or "full"'


def keeps_features(trace: Trace, site: str) -> bool:
    """Tell whether the reduction left single neurons, or whatever the site has."""
    return places(trace, site, np.empty(0, int)).features is not None


def labels_of(trace: Trace, atlas: object) -> Labels:
    """Return the atlas if its labels are those of the model that was traced.

    Raises
    ------
    InvalidArgument
        It is none, or of another model or revision: its labels would be wrong.
    """
    if not isinstance(atlas, Labels):
        raise invalid(
            "atlas",
            f"must be what reltrace.load_atlas returns, not {type(atlas).__name__}",
        )
    traced = [trace.provenance.model, trace.provenance.revision]
    made_by = list(atlas.about.get("made_by") or ())
    if made_by != traced:
        of = "@".join(made_by) if made_by else "no model: it is empty"
        raise invalid("atlas", f"is of {of}; the trace is of {'@'.join(traced)}")
    return atlas


def has_labels(site: str) -> bool:
    """Tell whether the features of a site are what an atlas labels."""
    return site in SITES


def _which(entry: Entry) -> tuple[int, int]:
    # Sites with labels have layers, and `keeps_features` was asked.
    assert entry.layer is not None
    assert entry.feature is not None
    return entry.layer, entry.feature
