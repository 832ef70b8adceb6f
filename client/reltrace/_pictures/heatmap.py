"""The numbers of the layers-by-tokens heatmap, the same for PNG and HTML."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reltrace._pictures.display import alone, layer_numbers
from reltrace._pictures.words import Words
from reltrace._trace import SITES_WITHOUT_LAYERS, Trace


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One site of a trace as a table.

    Attributes
    ----------
    raw : ndarray of float32, shape [tokens, columns]
        Relevance; columns are layers, or the one column of a site without layers.
    shown : ndarray of float32, shape [tokens, columns]
        What the colours show: from -1 to 1 per layer, or raw.
    limit : float
        The value at which the colour scale ends on both sides of zero.
    tokens : list of str
        Readable.
    columns : list of str
        Labels of the columns.
    title : str
        What is traced.
    scale : str
        What the colours show.
    """

    raw: NDArray[np.float32]
    shown: NDArray[np.float32]
    limit: float
    tokens: list[str]
    columns: list[str]
    title: str
    scale: str


def heatmap(trace: Trace, site: str, *, normalize: bool) -> Heatmap:
    """Return the heatmap of a site.

    Raises
    ------
    InvalidArgument
        If the trace has no value per token.
    """
    values = trace.by_token(site).astype(np.float32)
    layered = site not in SITES_WITHOUT_LAYERS
    raw = values.T if layered else values[:, None]
    shown = raw
    if normalize:
        largest = np.abs(raw).max(axis=0, keepdims=True)
        shown = np.divide(raw, np.where(largest == 0, np.float32(1), largest), dtype=np.float32)
    finite = np.abs(shown[np.isfinite(shown)])
    limit = float(finite.max()) if finite.size else 0.0
    columns = [str(layer) for layer in layer_numbers(trace, raw.shape[1])] if layered else [site]
    divided = "each layer divided by its largest |R|" if layered else "divided by the largest |R|"
    return Heatmap(
        raw=raw,
        shown=shown,
        limit=limit or 1.0,
        tokens=Words.of(trace).names,
        columns=columns,
        title=f"Relevance of {describe_target(trace)}",
        scale=f"site {site}, {divided if normalize else 'raw relevance'}",
    )


def describe_target(trace: Trace) -> str:
    """Return the target in words: what was traced and its value."""
    target = trace.target
    kind = "log-probability" if target.logprob else "logit"
    name = repr(alone(target.token, trace.tokens))
    if target.contrast is not None:
        name += f" minus {alone(target.contrast, trace.tokens)!r}"
    if len(target.continuation_ids) > 1:
        name = f"{len(target.continuation_ids)} response tokens"
    return f"{name} ({kind} {target.logit:.3f})"
