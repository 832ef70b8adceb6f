"""The layers-by-tokens heatmap as a picture, through matplotlib (the extra ``reltrace[plot]``)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reltrace.storage.atomic_files import replace_file
from reltrace.types.arrays import SITES_WITHOUT_LAYERS
from reltrace.types.trace import Trace
from reltrace.viz.colours import layer_numbers
from reltrace.viz.words import Segment, Words, describe_target, segments

# A prompt with more tokens is drawn in fewer rows than tokens.
_MAX_TOKENS, _POOLED_ROWS = 600, 120

# Inches. Past the largest height, rows get thinner and labels rarer.
_ROW = 0.26
_COLUMN = 0.42
_HEIGHTS = (2.5, 40.0)
_WIDTHS = (6.0, 36.0)
_LABELS_PER_INCH = 5.5

# Fonts of the usual systems for Chinese, Japanese, Korean and Indic scripts.
_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Arial Unicode MS", "Noto Sans Devanagari", "Nirmala UI",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One site of a trace as a table: tokens by layers, or by the one column of "embed"."""

    shown: NDArray[np.float32]
    """Values [rows, columns]: from -1 to 1 per layer, or raw."""
    rows: list[str]
    segments: list[Segment]
    """Turns of a conversation, counted in rows."""
    columns: list[str]
    scale: str
    """What the colours show, and how many tokens a row has."""


def heatmap(trace: Trace, site: str, *, normalize: bool) -> Heatmap:
    """Return the heatmap of a site.

    A prompt of more than 600 tokens has at most 120 rows, each of which shows the strongest of
    several tokens: a row per token would be too thin to be seen.
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
    if len(shown) > _MAX_TOKENS:
        step = -(-len(shown) // _POOLED_ROWS)
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
    columns = [str(layer) for layer in layer_numbers(trace, raw.shape[1])] if layered else [site]
    return Heatmap(shown, names, turns, columns, scale)


def _pooled(values: NDArray[np.float32], step: int) -> tuple[NDArray[np.float32], list[int]]:
    """Return the largest |value| of every `step` rows in each column, and the strongest rows."""
    rows, columns = values.shape
    count = -(-rows // step)
    # Values that are not finite count as largest, so that they are seen; padding as smallest.
    size = np.full((count * step, columns), -1, np.float32)
    size[:rows] = np.where(np.isfinite(values), np.abs(values), np.inf)
    size = size.reshape(count, step, columns)
    starts = np.arange(count) * step
    which = starts[:, None] + size.argmax(axis=1)
    return np.take_along_axis(values, which, 0), (starts + size.max(axis=2).argmax(axis=1)).tolist()


def write_heatmap(trace: Trace, path: Path, *, site: str, normalize: bool) -> None:
    """Write the heatmap of a site as PNG, SVG or PDF.

    Layers from left to right, tokens from top to bottom, blue over white to red with white at
    zero, as in the example of LXT's documentation (page "Latent Feature Attribution").
    """
    # Not pyplot: it keeps every figure, and picks a window system.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    table = heatmap(trace, site, normalize=normalize)
    rows, columns = table.shown.shape
    height = min(max(rows * _ROW + 1.4, _HEIGHTS[0]), _HEIGHTS[1])
    width = min(max(columns * _COLUMN + 3.5, _WIDTHS[0]), _WIDTHS[1])
    # The colour scale ends here on both sides of zero.
    limit = float(np.abs(table.shown[np.isfinite(table.shown)]).max(initial=0)) or 1.0
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        table.shown,
        # An odd number of colours: of 256, none is the white that zero must have.
        cmap=colormaps["bwr"].resampled(257),
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    every = _every(columns, width)
    axes.set_xticks(range(0, columns, every), table.columns[::every])
    every = _every(rows, height)
    axes.set_yticks(range(0, rows, every), table.rows[::every])
    axes.set_xlabel("Layers")
    axes.set_ylabel("Tokens")
    axes.set_title(f"Relevance of {describe_target(trace)}\n{table.scale}", fontsize="medium")
    families = _families()
    for text in (axes.title, *axes.get_yticklabels()):
        text.set_fontfamily(families)
        # A "$" in a token is a dollar, not a formula.
        text.set_parse_math(False)
    _draw_turns(axes, table, families)
    bar = figure.colorbar(image, ax=axes, fraction=min(0.05, 0.6 / width), aspect=4 * height)
    bar.set_label("R / largest |R| of the layer" if normalize else "R (units of the logit)")
    with warnings.catch_warnings():
        # A token in a script that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        with replace_file(path, durable=False) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def _draw_turns(axes: Any, table: Heatmap, families: list[str]) -> None:
    """Name the turns of a conversation on the right, with lines between them."""
    turns = [segment for segment in table.segments if segment.role]
    if not turns:
        return
    for row in sorted({edge for turn in turns for edge in (turn.first, turn.stop)}):
        if 0 < row < len(table.rows):
            axes.axhline(row - 0.5, color="black", linewidth=0.8)
    right = axes.secondary_yaxis("right")
    middles = [(turn.first + turn.stop - 1) / 2 for turn in turns]
    right.set_yticks(middles, [turn.role for turn in turns], rotation=90, va="center")
    right.tick_params(length=0)
    for text in right.get_yticklabels():
        text.set_fontfamily(families)
        text.set_parse_math(False)


def _families() -> list[str]:
    """Return matplotlib's own font, and what is installed for the scripts that it lacks."""
    from matplotlib import rcParams
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in _OTHER_SCRIPTS if name in installed)]


def _every(labels: int, inches: float) -> int:
    """Return the step at which labels fit."""
    return max(1, -(-labels // int(inches * _LABELS_PER_INCH)))
