"""The page of a trace."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.errors import invalid
from reltrace.types.neurons import Labels, has_labels, labels_of
from reltrace.types.token_text import printable
from reltrace.types.top_entries import values_of
from reltrace.types.trace import Trace
from reltrace.viz.colours import COLOURS, STREAM_SITES, layer_numbers
from reltrace.viz.templates import page
from reltrace.viz.words import Words, describe_target, next_tokens, segments

# Of all sites together: about 1.3 MB of the page.
_MAX_ENTRIES = 60_000
# Of each cell, if the page has room for all cells; and of each layer and of each token.
_PER_CELL, _PER_LINE = 10, 15


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


class _Entries(NamedTuple):
    """Single values [N] of a site, with rows of the layer axis, tokens and features."""

    rows: Array
    tokens: Array
    features: Array
    values: Array


def _site(trace: Trace, site: str, budget: int, labels: Labels | None) -> dict[str, Any]:
    """Return the data of a site: values by token and layer, and the strongest entries."""
    layered = site not in SITES_WITHOUT_LAYERS
    entries, total, what = _entries(trace, site, budget), values_of(trace, site).size, ""
    if entries is not None and "values" in trace.parts(site):
        what = f", sum of the {total:,} values that were kept"
        table = np.zeros((len(trace.tokens), entries.rows.max(initial=0) + 1), np.float32)
        np.add.at(table, (entries.tokens, entries.rows), entries.values)
    else:
        values = trace.by_token(site).astype(np.float32)
        table = values.T if layered else values[:, None]
    numbers = layer_numbers(trace, table.shape[1]) if layered else ()
    text_column = numbers.index(min(numbers)) if site in STREAM_SITES else -1 if layered else 0
    note = ""
    if entries is not None and len(entries.values) < total:
        note = f"Of {total:,} values the page holds the {len(entries.values):,} strongest."
    return {
        "name": site,
        "what": what,
        "layered": layered,
        "columns": list(map(str, numbers)) if layered else [site],
        "values": _base64(table),
        # The column that colours the text while no layer is chosen; -1: the sum of all.
        "textColumn": text_column,
        "feature": site if has_labels(site) else "unit",
        "entries": "" if entries is None else _base64_entries(entries),
        "note": note,
        "labels": _labels(labels, site, numbers, entries)
        if labels is not None and entries is not None and has_labels(site)
        else None,
    }


def _entries(trace: Trace, site: str, most: int) -> _Entries | None:
    """Return about `most` of the strongest values; None if the features were summed over."""
    parts = trace.parts(site)
    if "values" in parts:
        tokens, features, values = (parts[name].ravel() for name in ("token", "feature", "values"))
        rows = np.indices(np.atleast_2d(parts["values"]).shape)[0].ravel()
        return _Entries(rows, tokens, features, values)
    values = parts[""][None] if site in SITES_WITHOUT_LAYERS else parts[""]
    if values.ndim != 3:
        return None
    flat = _strongest(values, most)
    rows, tokens, features = np.unravel_index(flat, values.shape)
    return _Entries(rows, tokens, features, values.ravel()[flat])


def _strongest(values: Array, most: int) -> Array:
    """Return flat indices of values [L, T, F]: the strongest of cells, of layers and of tokens."""
    layers, tokens, features = values.shape
    size = np.abs(values, dtype=np.float32)
    size[~np.isfinite(size)] = -1
    chosen = []
    if layers * tokens <= most:
        per_cell = max(1, min(_PER_CELL, most // (layers * tokens)))
        starts = np.arange(layers * tokens)[:, None] * features
        chosen.append(starts + _largest(size.reshape(-1, features), per_cell))
    per_line = max(1, min(_PER_LINE, most // (2 * (layers + tokens))))
    starts = np.arange(layers)[:, None] * tokens * features
    chosen.append(starts + _largest(size.reshape(layers, -1), per_line))
    of_token = _largest(size.transpose(1, 0, 2).reshape(tokens, -1), per_line)
    layer, feature = np.divmod(of_token, features)
    chosen.append((layer * tokens + np.arange(tokens)[:, None]) * features + feature)
    return np.unique(np.concatenate([found.ravel() for found in chosen]))


def _largest(size: Array, k: int) -> Array:
    """Return the columns of the k largest values of each row."""
    k = min(k, size.shape[1])
    return np.argpartition(-size, k - 1, axis=1)[:, :k]


def _labels(
    labels: Labels, site: str, numbers: tuple[int, ...], entries: _Entries
) -> dict[int, dict[int, str]]:
    """Return the labels of the features on the page, by layer and feature, without empty ones."""
    pairs = np.unique(np.stack([entries.rows, entries.features], axis=1), axis=0)
    texts: dict[int, dict[int, str]] = {}
    for row, feature in pairs.tolist():
        if text := labels.label(numbers[row], feature, site):
            texts.setdefault(numbers[row], {})[feature] = printable(text)
    return texts


def _base64(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _base64_entries(entries: _Entries) -> str:
    """Return (row of the layer, token, feature, value) of each, four bytes a number."""
    bits = entries.values.astype("<f4").view("<i4")
    words = np.stack([entries.rows, entries.tokens, entries.features, bits], axis=1).astype("<i4")
    return base64.b64encode(words.tobytes()).decode()
