"""Single values of a trace, with their layer, token and feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reltrace.types.arrays import SITES_WITHOUT_LAYERS, Array
from reltrace.types.checks import whole_number
from reltrace.types.errors import MissingDependency, invalid

if TYPE_CHECKING:
    import pandas as pd

    from reltrace.types.trace import Trace


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a trace.

    Attributes
    ----------
    value : float
        The relevance, raw.
    site : str
        Where it was read.
    layer : int or None
        Number of the decoder layer; None at a site without layers ("embed").
    position : int or None
        Index of the token; None where the reduction summed over the tokens ("feature").
    token : str or None
        That token.
    feature : int or None
        Index of the hidden unit, head or neuron; None where the reduction summed over them
        ("token").
    """

    value: float
    site: str
    layer: int | None
    position: int | None
    token: str | None
    feature: int | None


class Columns(NamedTuple):
    """Values of a site with their layers, positions and features; None where summed over."""

    values: Array
    layers: Array | None
    positions: Array | None
    features: Array | None


def values_of(trace: Trace, site: str) -> Array:
    """Return all values of a site, flat, for every reduction."""
    parts = trace.parts(site)
    return parts["values" if "values" in parts else ""].ravel()


def columns(trace: Trace, site: str, rows: Array) -> Columns:
    """Return the values of `values_of` at some of its indices."""
    parts = trace.parts(site)
    is_topk = set(parts) == {"values", "token", "feature"}
    values = parts["values"] if is_topk else parts[""]
    index = list(np.unravel_index(rows, values.shape))
    layers = None
    if site not in SITES_WITHOUT_LAYERS:
        # Older files do not name their layers.
        layers = np.array(trace.layers or range(values.shape[0]))[index.pop(0)]
    positions: Array | None
    features: Array | None
    if is_topk:
        positions, features = parts["token"].ravel()[rows], parts["feature"].ravel()[rows]
    elif len(index) == 2:
        positions, features = index
    elif len(index) == 1:
        summed_over_tokens = trace.provenance.reduction == "feature"
        positions, features = (None, index[0]) if summed_over_tokens else (index[0], None)
    else:
        raise invalid("site", f"{site!r} has a shape that no known reduction produces")
    return Columns(values.ravel()[rows], layers, positions, features)


def strongest(trace: Trace, k: int, site: str) -> list[Entry]:
    """Return the entries with the largest absolute values. See `Trace.top`."""
    k = whole_number(k, "k", 1)
    size = np.abs(values_of(trace, site), dtype=np.float32)
    # Values that are not finite are sorted last.
    size[~np.isfinite(size)] = -1
    k = min(k, len(size))
    rows = np.argpartition(-size, k - 1)[:k] if k else np.empty(0, int)
    # Equal values keep their order in the tensor.
    rows = rows[np.lexsort((rows, -size[rows]))]
    found = columns(trace, site, rows)
    entries = []
    for row in range(k):
        layer, position, feature = (
            None if column is None else int(column[row]) for column in found[1:]
        )
        token = None if position is None else trace.tokens[position]
        entries.append(Entry(float(found.values[row]), site, layer, position, token, feature))
    return entries


def frame(trace: Trace, site: str) -> pd.DataFrame:
    """Return the values of a site as a data frame. See `Trace.to_pandas`."""
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependency("to_pandas needs pandas: pip install 'reltrace[pandas]'") from error
    found = columns(trace, site, np.arange(values_of(trace, site).size))
    data: dict[str, Any] = {}
    if found.layers is not None:
        data["layer"] = found.layers
    if found.positions is not None:
        data["position"] = found.positions
        data["token"] = np.array(trace.tokens, dtype=object)[found.positions]
    if found.features is not None:
        data["feature"] = found.features
    return pd.DataFrame({**data, "relevance": found.values})
