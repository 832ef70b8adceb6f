"""The page of a trace."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any

import numpy as np

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.errors import invalid
from reltrace.types.neurons import Labels, has_labels, labels_of
from reltrace.types.token_text import printable
from reltrace.types.trace import Trace
from reltrace.viz.colours import COLOURS, STREAM_SITES, layer_numbers
from reltrace.viz.strongest import Strongest, strongest_of
from reltrace.viz.templates import page
from reltrace.viz.words import Words, describe_target, next_tokens, segments

# The strongest features of all sites together: about 1.3 MB of the page.
_MAX_ENTRIES = 60_000
_FEATURES = {"head": "head", "neuron": "neuron"}


def trace_page(trace: Trace, *, site: str, normalize: bool, atlas: Labels | None = None) -> str:
    """Return the page of a trace."""
    if trace.provenance.reduction == "feature":
        raise invalid(
            "reduce", '"feature" leaves no value per token; use "token", "topk" or "full"'
        )
    labels = None if atlas is None else labels_of(trace, atlas)
    words = Words.of(trace)
    budget = _MAX_ENTRIES // len(trace.sites)
    data = {
        "tokens": words.names,
        "words": words.texts,
        "special": words.special,
        "segments": [asdict(segment) for segment in segments(trace)],
        "next": next_tokens(trace, len(trace.target.candidates)),
        "hints": trace.hints,
        "sites": [_site(trace, name, budget, labels) for name in trace.sites],
        "first": trace.sites.index(site),
        "normalized": normalize,
        "colours": COLOURS,
    }
    title = f"Relevance of {describe_target(trace)}"
    return page("trace", title=title, about=_about(trace), data=data)


def _about(trace: Trace) -> str:
    provenance = trace.provenance
    versions = ", ".join(f"{name} {number}" for name, number in sorted(provenance.versions.items()))
    return (
        f"Model {provenance.model}, rule {provenance.rule}, {provenance.dtype} on "
        f"{provenance.device}{versions and '; '}{versions}. "
        "R = x · dL/dx, the backward pass starting at 1."
    )


def _site(trace: Trace, site: str, budget: int, labels: Labels | None) -> dict[str, Any]:
    """Return the data of a site: values by token and layer, and the strongest features."""
    found = strongest_of(trace, site, budget)
    layered = site not in SITES_WITHOUT_LAYERS
    if found is not None and found.sums is not None:
        values, what = found.sums, f", sum of the {len(found.values):,} values that were kept"
    else:
        values, what = trace.by_token(site), ""
    values = values.astype(np.float32)
    table = values.T if layered else values[:, None]
    numbers = layer_numbers(trace, table.shape[1]) if layered else ()
    text_column = numbers.index(min(numbers)) if site in STREAM_SITES else -1 if layered else 0
    return {
        "name": site,
        "what": what,
        "layered": layered,
        "columns": list(map(str, numbers)) if layered else [site],
        "values": _base64(table),
        # The column that colours the text while no layer is chosen; -1: the sum of all.
        "textColumn": text_column,
        "feature": _FEATURES.get(site, "unit"),
        "entries": "" if found is None else _base64_entries(found),
        "note": _note(found),
        "labels": None
        if labels is None or found is None or not has_labels(site)
        else _labels(labels, site, numbers, found),
    }


def _labels(
    labels: Labels, site: str, numbers: tuple[int, ...], found: Strongest
) -> dict[int, dict[int, str]]:
    """Return the labels of the features on the page, by layer and feature, without empty ones."""
    pairs = np.unique(np.stack([found.rows, found.features], axis=1), axis=0)
    texts: dict[int, dict[int, str]] = {}
    for row, feature in pairs.tolist():
        if text := labels.label(numbers[row], feature, site):
            texts.setdefault(numbers[row], {})[feature] = printable(text)
    return texts


def _note(found: Strongest | None) -> str:
    if found is None or len(found.values) == found.total:
        return ""
    return f"Of {found.total:,} values the page holds the {len(found.values):,} strongest."


def _base64(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _base64_entries(found: Strongest) -> str:
    """Return (row of the layer, token, feature, value) of each, four bytes a number."""
    bits = found.values.astype("<f4").view("<i4")
    words = np.stack([found.rows, found.tokens, found.features, bits], axis=1).astype("<i4")
    return base64.b64encode(words.tobytes()).decode()
