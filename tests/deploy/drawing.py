"""Draws the dashboard from a live Prometheus, for where there is no Grafana to look at it.

    python tests/deploy/drawing.py --prometheus http://127.0.0.1:9090 --out dashboard.png

Every panel stands where the dashboard puts it, and shows what its own queries give.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from deploy.panels import Panel, Prometheus, Series, Span, load
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, MaxNLocator, MultipleLocator

COLUMNS = 24
CELL = (0.75, 0.42)
"""Inches."""
COLOURS = "#73BF69 #F2CC0C #5794F2 #FF780A #F2495C #B877D9 #8AB8FF #FFA6B0 #96D98D #FFCB7D".split()
DARK, FAINT, TEXT = "#181B1F", "#2F333A", "#D5D8DC"

Axes = Any


def scaled(value: float, base: float, names: Sequence[str]) -> str:
    """Return three digits and the unit that fits."""
    power = 0
    while abs(value) >= base and power + 1 < len(names):
        value, power = value / base, power + 1
    return f"{value:.3g}{names[power]}"


def duration(seconds: float) -> str:
    if seconds != 0 and abs(seconds) < 1:
        return f"{seconds * 1000:.3g} ms"
    for name, length in (("day", 86400), ("hour", 3600), ("min", 60)):
        if abs(seconds) >= length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} s"


UNITS: dict[str, Callable[[float], str]] = {
    "short": lambda value: scaled(value, 1000, ["", " K", " Mil", " Bil"]),
    "ops": lambda value: scaled(value, 1000, ["", "K"]) + " ops/s",
    "opm": lambda value: scaled(value, 1000, ["", "K"]) + " ops/m",
    "percentunit": lambda value: f"{value * 100:.3g}%",
    "bytes": lambda value: scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]),
    "Bps": lambda value: scaled(value, 1000, [" B/s", " kB/s", " MB/s", " GB/s"]),
    "s": duration,
}


def draw(panels: Sequence[Panel], answers: Sequence[Sequence[Series]], span: Span) -> Figure:
    """Draw all panels in their places.

    Parameters
    ----------
    answers : sequence of sequences of Series
        Of each panel.
    """
    rows = max(y + height for _, y, _, height in (panel.place for panel in panels))
    figure = Figure(figsize=(COLUMNS * CELL[0], rows * CELL[1]), facecolor="#111217", dpi=100)
    FigureCanvasAgg(figure)
    for panel, series in zip(panels, answers, strict=True):
        x, y, width, height = panel.place
        box = (x / COLUMNS, 1 - (y + height) / rows, width / COLUMNS, height / rows)
        if panel.kind == "row":
            figure.text(
                box[0] + 0.004, box[1] + box[3] * 0.25, panel.title, color="white", fontsize=12
            )
            continue
        _card(figure, box, panel.title)
        inner = _inset(box, left=0.6, right=0.15, bottom=0.62, top=0.38, figure=figure)
        if not series:
            figure.text(
                box[0] + box[2] / 2, box[1] + box[3] / 2.4, panel.empty,
                color="#8E939B", ha="center", fontsize=11,
            )  # fmt: skip
        elif panel.kind == "stat":
            _stat(figure, box, panel, series)
        elif panel.kind == "bargauge":
            _bars(figure.add_axes(inner), panel, series)
        else:
            _lines(figure.add_axes(inner), panel, series, span)
    return figure


Box = tuple[float, float, float, float]


def _inset(
    box: Box, *, left: float, right: float, bottom: float, top: float, figure: Figure
) -> Box:
    """Take margins, in inches, off a box in parts of the figure."""
    width, height = figure.get_size_inches()
    return (
        box[0] + left / width,
        box[1] + bottom / height,
        box[2] - (left + right) / width,
        box[3] - (bottom + top) / height,
    )


def _card(figure: Figure, box: Box, title: str) -> None:
    card = figure.add_axes(
        _inset(box, left=0.05, right=0.05, bottom=0.05, top=0.05, figure=figure), facecolor=DARK
    )
    card.set(xticks=[], yticks=[])
    for spine in card.spines.values():
        spine.set_color(FAINT)
    card.text(
        0.015, 1 - 0.08 / (box[3] * figure.get_size_inches()[1]), title,
        transform=card.transAxes, color=TEXT, fontsize=10, va="top",
    )  # fmt: skip


def _stat(figure: Figure, box: Box, panel: Panel, series: Sequence[Series]) -> None:
    (only,) = series
    number = UNITS[panel.unit](only.values[-1])
    figure.text(
        box[0] + box[2] / 2, box[1] + box[3] * 0.45, number,
        color=panel.colour(only.values[-1]), ha="center", va="center", fontsize=24,
    )  # fmt: skip
    if len(only.values) > 1:
        spark = figure.add_axes((box[0] + 0.003, box[1] + 0.003, box[2] - 0.006, box[3] * 0.25))
        spark.fill_between(only.times, only.values, color=COLOURS[2], alpha=0.3, linewidth=0)
        spark.plot(only.times, only.values, color=COLOURS[2], linewidth=1)
        spark.set_ylim(0, max(max(only.values), 1e-9) * 1.1)
        spark.axis("off")


def _bars(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    shown = list(reversed(series))
    values = [one.values[-1] for one in shown]
    axes.barh(range(len(shown)), values, color=COLOURS[2], height=0.6)
    top = max([*values, 1e-9])
    axes.set(xlim=(0, top * 1.35), ylim=(-0.7, max(len(shown), 3) - 0.3), xticks=[], yticks=[])
    axes.set_facecolor(DARK)
    for index, one in enumerate(shown):
        text = f"{one.name}  {UNITS[panel.unit](one.values[-1])}"
        axes.text(top * 0.02, index, text, color="white", va="center", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _lines(axes: Axes, panel: Panel, series: Sequence[Series], span: Span) -> None:
    axes.set_facecolor(DARK)
    floor: dict[float, float] = {}
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        times, values = _with_gaps(one, span.step)
        if panel.stacked:
            low = [floor.get(at, 0.0) for at in times]
            values = [bottom + value for bottom, value in zip(low, values, strict=True)]
            floor |= {at: v for at, v in zip(times, values, strict=True) if not math.isnan(v)}
        else:
            low = [0.0] * len(times)
        when = [datetime.fromtimestamp(at) for at in times]
        axes.plot(when, values, color=colour, linewidth=1.2, label=one.name or panel.title)
        axes.fill_between(
            when, low, values, color=colour, alpha=0.3 if panel.stacked else 0.1, linewidth=0
        )
    low_bound, high_bound = panel.bounds
    axes.set_xlim(datetime.fromtimestamp(span.start), datetime.fromtimestamp(span.end))
    highest = max([v for one in series for v in one.values] + list(floor.values()))
    top = high_bound if high_bound is not None else (highest or 1) * 1.1
    axes.set_ylim(low_bound, top)
    axes.yaxis.set_major_locator(_ticks(panel.unit, top))
    axes.yaxis.set_major_formatter(lambda value, _: UNITS[panel.unit](value))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M" if span.step > 1.5 else "%H:%M:%S"))
    axes.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=6))
    axes.tick_params(colors="#8E939B", labelsize=7, length=0)
    axes.grid(color=FAINT, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.06, -0.12), ncols=3, fontsize=7, frameon=False,
        labelcolor=TEXT, handlelength=1, columnspacing=1, borderaxespad=0,
    )  # fmt: skip


def _ticks(unit: str, top: float) -> Locator:
    """Place ticks on numbers that are round in their unit."""
    if unit == "bytes":
        return MultipleLocator(2.0 ** math.ceil(math.log2(top / 4)))
    if unit == "s" and top > 60:
        steps = [15, 30, *(60 * m for m in (1, 2, 5, 10, 15, 30, 60, 120, 360, 720, 1440))]
        return MultipleLocator(next((step for step in steps if step >= top / 5), top / 5))
    return MaxNLocator(4, steps=[1, 2, 5, 10])


def _with_gaps(series: Series, step: float) -> tuple[list[float], list[float]]:
    """Break the line where points are missing."""
    times: list[float] = []
    values: list[float] = []
    for at, value in zip(series.times, series.values, strict=True):
        if times and at - times[-1] > 1.5 * step:
            times.append(times[-1] + step)
            values.append(math.nan)
        times.append(at)
        values.append(value)
    return times, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back")
    parser.add_argument("--scrape", type=float, default=10.0, help="seconds between its scrapes")
    parser.add_argument("--model", default=".*", help="which models, as a regular expression")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    options = parser.parse_args()
    end = time.time()
    span = Span(end - 60 * options.minutes, end, max(options.scrape, options.minutes * 60 / 400))
    prometheus = Prometheus(options.prometheus, options.scrape)
    panels = load()
    answers = [prometheus.series(panel, span, options.model) for panel in panels]
    draw(panels, answers, span).savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
