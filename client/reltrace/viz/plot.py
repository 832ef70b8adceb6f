"""The heatmap as a picture, through matplotlib (the extra ``reltrace[plot]``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from reltrace.types.trace import Trace
from reltrace.viz.heatmap import Heatmap, heatmap

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


def write_heatmap(trace: Trace, path: Path, *, site: str, normalize: bool) -> None:
    """Write the heatmap of a site as PNG, SVG or PDF.

    Layers from left to right, tokens from top to bottom, blue over white to red with white at
    zero, as in the example of LXT's documentation (page "Latent Feature Attribution").

    Raises
    ------
    InvalidArgument
        If the trace has no value per token.
    """
    # Not pyplot: it keeps every figure, and picks a window system.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    table = heatmap(trace, site, normalize=normalize)
    rows, columns = table.shown.shape
    height = min(max(rows * _ROW + 1.4, _HEIGHTS[0]), _HEIGHTS[1])
    width = min(max(columns * _COLUMN + 3.5, _WIDTHS[0]), _WIDTHS[1])
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        table.shown,
        # An odd number of colours: of 256, none is the white that zero must have.
        cmap=colormaps["bwr"].resampled(257),
        vmin=-table.limit,
        vmax=table.limit,
        aspect="auto",
        interpolation="nearest",
    )
    every = _every(columns, width)
    axes.set_xticks(range(0, columns, every), table.columns[::every])
    every = _every(rows, height)
    axes.set_yticks(range(0, rows, every), table.rows[::every])
    axes.set_xlabel("Layers")
    axes.set_ylabel("Tokens")
    axes.set_title(f"{table.title}\n{table.scale}", fontsize="medium")
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
        figure.savefig(path, dpi=150)


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
