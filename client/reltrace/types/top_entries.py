"""Single values of a trace, with where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reltrace.types.checks import whole_number
from reltrace.types.errors import MissingDependency, invalid
from reltrace.types.trace import SITES_WITHOUT_LAYERS, Array, Trace

if TYPE_CHECKING:
    import pandas as pd


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


@dataclass(frozen=True, slots=True)
class Places:
    """Where some values of a site stand; None: an axis that the reduction summed over.

    Attributes
    ----------
    values : ndarray of float, shape [N]
        Relevance.
    layers, positions, features : ndarray of int, shape [N], or None
        Numbers of the layers, indices of the tokens, indices of the features.
    """

    values: Array
    layers: Array | None
    positions: Array | None
    features: Array | None


def values_of(trace: Trace, site: str) -> Array:
    """Return the values of a site, one after another, whatever the reduction left."""
    parts = trace.parts(site)
    return parts["values" if "values" in parts else ""].ravel()


def places(trace: Trace, site: str, rows: Array) -> Places:
    """Return where some of the values of `values_of` stand.

    Raises
    ------
    InvalidArgument
        If the tensors of the site are of no reduction that is known here.
    """
    parts = trace.parts(site)
    several = set(parts) == {"values", "token", "feature"}
    values = parts["values"] if several else parts[""]
    index = list(np.unravel_index(rows, values.shape))
    numbers = None
    if site not in SITES_WITHOUT_LAYERS:
        # Older files do not say which layers they are.
        numbers = np.array(trace.layers or range(values.shape[0]))[index.pop(0)]
    positions: Array | None
    features: Array | None
    if several:
        positions, features = parts["token"].ravel()[rows], parts["feature"].ravel()[rows]
    elif len(index) == 2:
        positions, features = index
    elif len(index) == 1:
        summed = trace.provenance.reduction == "feature"
        positions, features = (None, index[0]) if summed else (index[0], None)
    else:
        raise invalid("site", f"{site!r} has a form that no known reduction leaves")
    return Places(values.ravel()[rows], numbers, positions, features)


def strongest(trace: Trace, k: int, site: str) -> list[Entry]:
    """Return the largest entries of a site. See `Trace.top`."""
    k = whole_number(k, "k", 1)
    size = np.abs(values_of(trace, site), dtype=np.float32)
    # What is not finite is no larger than anything.
    size[~np.isfinite(size)] = -1
    k = min(k, len(size))
    first = np.argpartition(-size, k - 1)[:k] if k else np.empty(0, int)
    # Of equal ones the first in the tensor comes first.
    first = first[np.lexsort((first, -size[first]))]
    found = places(trace, site, first)
    return [_entry(trace, site, found, row) for row in range(k)]


def _entry(trace: Trace, site: str, found: Places, row: int) -> Entry:
    position = None if found.positions is None else int(found.positions[row])
    return Entry(
        value=float(found.values[row]),
        site=site,
        layer=None if found.layers is None else int(found.layers[row]),
        position=position,
        token=None if position is None else trace.tokens[position],
        feature=None if found.features is None else int(found.features[row]),
    )


def frame(trace: Trace, site: str) -> pd.DataFrame:
    """Return the values of a site as a data frame. See `Trace.to_pandas`."""
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependency("to_pandas needs pandas: pip install 'reltrace[pandas]'") from error
    found = places(trace, site, np.arange(values_of(trace, site).size))
    columns: dict[str, Any] = {}
    if found.layers is not None:
        columns["layer"] = found.layers
    if found.positions is not None:
        columns["position"] = found.positions
        columns["token"] = np.array(trace.tokens, dtype=object)[found.positions]
    if found.features is not None:
        columns["feature"] = found.features
    return pd.DataFrame({**columns, "relevance": found.values})
