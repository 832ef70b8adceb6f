"""The numbers of the layers-by-tokens heatmap, the same for PNG and HTML."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reltrace.types.arrays import SITES_WITHOUT_LAYERS
from reltrace.types.token_text import quoted, readable_alone
from reltrace.types.trace import Trace
from reltrace.viz.display import layer_numbers
from reltrace.viz.words import Segment, Words, segments

# Of more tokens than the first, so many rows are drawn.
_MOST_TOKENS, _MOST_ROWS = 600, 120


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One site of a trace as a table.

    Attributes
    ----------
    shown : ndarray of float32, shape [rows, columns]
        What the colours show: from -1 to 1 per layer, or raw. Rows are tokens, or some tokens in a
        row of which the strongest is shown; columns are layers, or the one column of a site
        without layers.
    limit : float
        The value at which the colour scale ends on both sides of zero.
    rows : list of str
        Labels of the rows: the tokens, readable.
    segments : list of Segment
        Turns of a conversation, and what is between them, in rows.
    columns : list of str
        Labels of the columns.
    title : str
        What is traced.
    scale : str
        What the colours show, and of how many tokens a row is.
    """

    shown: NDArray[np.float32]
    limit: float
    rows: list[str]
    segments: list[Segment]
    columns: list[str]
    title: str
    scale: str


def heatmap(trace: Trace, site: str, *, normalize: bool) -> Heatmap:
    """Return the heatmap of a site.

    Of more than 600 tokens the strongest of some in a row are shown, in at most 120 rows: a token's
    own would be thinner than what is seen.

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
    divided = "each layer divided by its largest |R|" if layered else "divided by the largest |R|"
    names, turns = Words.of(trace).names, segments(trace)
    scale = f"site {site}, {divided if normalize else 'raw relevance'}"
    if len(shown) > _MOST_TOKENS:
        step = -(-len(shown) // _MOST_ROWS)
        shown, strongest = _pooled(shown, step)
        starts = range(0, len(names), step)
        names = [
            f"{first}–{min(first + step, len(names)) - 1} {names[token]}"
            for first, token in zip(starts, strongest, strict=True)
        ]
        turns = [
            Segment(turn.first // step, -(-turn.stop // step), turn.role)
            for turn in turns if turn.role
        ]  # fmt: skip
        scale += f"; a row has the strongest of {step} tokens, and names it"
    finite = np.abs(shown[np.isfinite(shown)])
    limit = float(finite.max()) if finite.size else 0.0
    columns = [str(layer) for layer in layer_numbers(trace, raw.shape[1])] if layered else [site]
    return Heatmap(
        shown=shown,
        limit=limit or 1.0,
        rows=names,
        segments=turns,
        columns=columns,
        title=f"Relevance of {describe_target(trace)}",
        scale=scale,
    )


def _pooled(values: NDArray[np.float32], step: int) -> tuple[NDArray[np.float32], list[int]]:
    """Return, of every `step` rows, each column's largest |value|, and the row with the largest."""
    rows, columns = values.shape
    count = -(-rows // step)
    # What is not finite is larger than anything, and shown as such; what fills up is smaller.
    size = np.full((count * step, columns), -1, np.float32)
    size[:rows] = np.where(np.isfinite(values), np.abs(values), np.inf)
    size = size.reshape(count, step, columns)
    starts = np.arange(count) * step
    which = starts[:, None] + size.argmax(axis=1)
    return np.take_along_axis(values, which, 0), (starts + size.max(axis=2).argmax(axis=1)).tolist()


def describe_target(trace: Trace) -> str:
    """Return the target in words: what was traced and its value."""
    target = trace.target
    kind = "log-probability" if target.logprob else "logit"
    name = quoted(readable_alone(target.token))
    if target.contrast is not None:
        name += f" minus {quoted(readable_alone(target.contrast))}"
    if len(target.continuation_ids) > 1:
        name = f"{len(target.continuation_ids)} response tokens"
    return f"{name} ({kind} {target.logit:.3f})"
