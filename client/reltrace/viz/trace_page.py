"""One trace as a page: everything in one file, which loads nothing from anywhere."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.errors import invalid
from reltrace.types.neurons import Labels, has_labels, labels_of
from reltrace.types.token_text import printable
from reltrace.types.trace import Trace
from reltrace.viz.display import (
    NEGATIVE,
    POSITIVE,
    STREAM_SITES,
    ZERO,
    layer_numbers,
)
from reltrace.viz.heatmap import describe_target
from reltrace.viz.single_file import filled
from reltrace.viz.strongest import Strongest, strongest_of
from reltrace.viz.words import Words, next_tokens, segments

# Of the strongest features of all sites together: about 1.3 MB of the page.
_MOST_ENTRIES = 60_000
_FEATURES = {"head": "head", "neuron": "neuron"}


def write(
    trace: Trace, path: Path, *, site: str, normalize: bool, atlas: Labels | None = None
) -> None:
    """Write the page.

    Raises
    ------
    InvalidArgument
        If the trace has no value per token, or the atlas is of another model.
    """
    text = page(trace, site=site, normalize=normalize, atlas=atlas)
    path.write_text(text, encoding="utf-8")


def page(trace: Trace, *, site: str, normalize: bool, atlas: Labels | None = None) -> str:
    """Return the page's text."""
    if trace.provenance.reduction == "feature":
        raise invalid(
            "reduce", '"feature" leaves no value per token; use "token", "topk" or "full"'
        )
    labels = None if atlas is None else labels_of(trace, atlas)
    words = Words.of(trace)
    budget = _MOST_ENTRIES // len(trace.sites)
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
        "colours": {"negative": NEGATIVE, "zero": ZERO, "positive": POSITIVE},
    }
    return filled(
        "trace", title=f"Relevance of {describe_target(trace)}", about=_about(trace), data=data
    )


def _about(trace: Trace) -> str:
    provenance = trace.provenance
    versions = ", ".join(f"{name} {number}" for name, number in sorted(provenance.versions.items()))
    return (
        f"Model {provenance.model}, rule {provenance.rule}, {provenance.dtype} on "
        f"{provenance.device}" + (f"; {versions}" if versions else "")
    )


def _site(trace: Trace, site: str, budget: int, labels: Labels | None) -> dict[str, Any]:
    """Return what the page knows of a site: values by token and layer, and strongest features."""
    found = strongest_of(trace, site, budget)
    layered = site not in SITES_WITHOUT_LAYERS
    if found is not None and found.sums is not None:
        values, what = found.sums, f", sum of the {found.kept:,} values that were kept"
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
        # What colours the text while no layer is chosen: a column, or -1 for their sum.
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
    """Return the labels of what is on the page, by layer and feature: each once, and no empty."""
    # Many entries are of one neuron, at other tokens.
    pairs = np.unique(np.stack([found.rows, found.features], axis=1), axis=0)
    texts: dict[int, dict[int, str]] = {}
    for row, feature in pairs.tolist():
        if text := labels.label(numbers[row], feature, site):
            texts.setdefault(numbers[row], {})[feature] = printable(text)
    return texts


def _note(found: Strongest | None) -> str:
    if found is None or found.kept == found.all:
        return ""
    return f"Of {found.all:,} values the page holds the {found.kept:,} strongest."


def _base64(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _base64_entries(found: Strongest) -> str:
    """Return (row of the layer, token, feature, value) of each, four bytes a number."""
    words = np.empty((found.kept, 4), "<i4")
    words[:, 0], words[:, 1], words[:, 2] = found.rows, found.tokens, found.features
    words[:, 3] = found.values.astype("<f4").view("<i4")
    return base64.b64encode(words.tobytes()).decode()
