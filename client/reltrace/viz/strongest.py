"""The strongest features of a site, few enough for a page: of each cell, layer and token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.trace import Trace

# Of each layer and of each token, in addition to those of the cells.
_PER_LINE = 15
_PER_CELL = 10


class Strongest(NamedTuple):
    """Values [N] of a site, with rows of the layer axis (0: no layers), tokens and features."""

    rows: Array
    tokens: Array
    features: Array
    values: Array
    total: int
    """How many values the trace has at the site."""
    sums: Array | None = None
    """Sums by layer and token, if the trace has nothing else ("topk")."""


def strongest_of(trace: Trace, site: str, most: int) -> Strongest | None:
    """Return about `most` strongest values of a site; None if features were summed over."""
    parts = trace.parts(site)
    layered = site not in SITES_WITHOUT_LAYERS
    if "values" in parts:
        values, tokens = parts["values"], parts["token"].ravel()
        rows = np.indices(values.shape)[0].ravel() if layered else np.zeros(values.size, int)
        sums = np.zeros((rows.max(initial=0) + 1, len(trace.tokens)), np.float32)
        np.add.at(sums, (rows, tokens), values.ravel())
        sums = sums if layered else sums[0]
        features = parts["feature"].ravel()
        return Strongest(rows, tokens, features, values.ravel(), values.size, sums)
    values = parts[""] if layered else parts[""][None]
    if values.ndim != 3:
        return None
    flat = _choose(values, most)
    rows, tokens, features = np.unravel_index(flat, values.shape)
    return Strongest(rows, tokens, features, values.ravel()[flat], values.size)


def _choose(values: Array, most: int) -> Array:
    """Return flat indices of values [L, T, F]: first of cells, then of layers and of tokens."""
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
