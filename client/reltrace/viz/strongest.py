"""The strongest features of a site, few enough for a page: of each cell, layer and token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.trace import Trace

# Of each layer and of each token, whatever the cells leave.
_OF_A_LINE = 15
_OF_A_CELL = 10


@dataclass(frozen=True, slots=True)
class Strongest:
    """Values of a site with where they stand.

    Attributes
    ----------
    rows, tokens, features : ndarray of int, shape [N]
        Row of the layer axis (0 at a site without layers), index of the token, of the feature.
    values : ndarray of float, shape [N]
        Relevance.
    all : int
        How many values the trace has there.
    sums : ndarray of float, shape [L, T] or [T], or None
        Their sums by layer and token, where the trace holds nothing else ("topk").
    """

    rows: Array
    tokens: Array
    features: Array
    values: Array
    all: int
    sums: Array | None = None

    @property
    def kept(self) -> int:
        """How many they are."""
        return len(self.values)


def strongest_of(trace: Trace, site: str, most: int) -> Strongest | None:
    """Return about `most` strongest values of a site; None where features were summed over."""
    parts = trace.parts(site)
    layered = site not in SITES_WITHOUT_LAYERS
    if "values" in parts:
        return _kept(trace, parts["values"], parts["token"], parts["feature"], layered)
    values = parts[""] if layered else parts[""][None]
    return _of_full(values, most) if values.ndim == 3 else None


def _kept(trace: Trace, values: Array, tokens: Array, features: Array, layered: bool) -> Strongest:
    rows = np.indices(values.shape)[0] if layered else np.zeros(values.shape, int)
    sums = np.zeros((values.shape[0] if layered else 1, len(trace.tokens)), np.float32)
    np.add.at(sums, (rows.ravel(), tokens.ravel()), values.ravel())
    return Strongest(
        rows=rows.ravel(),
        tokens=tokens.ravel(),
        features=features.ravel(),
        values=values.ravel(),
        all=values.size,
        sums=sums if layered else sums[0],
    )


def _of_full(values: Array, most: int) -> Strongest:
    """Take the strongest of each cell, so far as there is room; then of each layer and token."""
    layers, tokens, features = values.shape
    size = np.abs(values, dtype=np.float32)
    size[~np.isfinite(size)] = -1
    of_a_cell = min(features, max(1, min(_OF_A_CELL, most // (layers * tokens))))
    chosen = []
    if layers * tokens <= most:
        last = np.argpartition(-size, of_a_cell - 1, axis=2)[:, :, :of_a_cell]
        cells = np.arange(layers * tokens).reshape(layers, tokens, 1)
        chosen.append((cells * features + last).ravel())
    of_a_line = max(1, min(_OF_A_LINE, most // (2 * (layers + tokens))))
    by_layer = size.reshape(layers, -1)
    k = min(of_a_line, by_layer.shape[1])
    found = np.argpartition(-by_layer, k - 1, axis=1)[:, :k]
    chosen.append((np.arange(layers)[:, None] * tokens * features + found).ravel())
    by_token = size.transpose(1, 0, 2).reshape(tokens, -1)
    k = min(of_a_line, by_token.shape[1])
    row, feature = np.divmod(np.argpartition(-by_token, k - 1, axis=1)[:, :k], features)
    chosen.append(((row * tokens + np.arange(tokens)[:, None]) * features + feature).ravel())
    flat = np.unique(np.concatenate(chosen))
    rows, places, which = np.unravel_index(flat, values.shape)
    return Strongest(rows, places, which, values.ravel()[flat], values.size)
