"""A trace in the terminal: its tokens, coloured by relevance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from reltrace._entries import Entry
from reltrace._neurons import Labels, has_labels, labelled
from reltrace._pictures.display import (
    colour,
    ink,
    printable,
    readable,
    readable_all,
    scaled,
    token_values,
)
from reltrace._pictures.heatmap import describe_target
from reltrace._trace import Trace

_LEGEND_CELLS = 25


def show(trace: Trace, console: Console) -> None:
    """Print the target, the coloured tokens and a legend; see `token_values` for what is shown.

    Without colours (a pipe, NO_COLOR) it prints a table of the values instead.

    Raises
    ------
    InvalidArgument
        If the trace has no value per token.
    """
    shown = token_values(trace)
    console.print(
        Text.assemble("Relevance of ", (describe_target(trace), "bold"), f": {shown.title}")
    )
    if console.color_system is None or console.no_color:
        console.print(_table(trace, shown.values))
        return
    text = Text()
    words = readable_all(trace.tokens)
    for word, share in zip(words, scaled(shown.values), strict=True):
        text.append(word, _style(float(share)))
    console.print(text, soft_wrap=True)
    finite = np.abs(shown.values[np.isfinite(shown.values)])
    console.print(_legend(float(finite.max()) if finite.size else 0.0))


def show_entries(
    trace: Trace, console: Console, count: int = 10, atlas: Labels | None = None
) -> None:
    """Print the strongest entries of each site, for reductions that leave no value per token."""
    console.print(Text.assemble("Relevance of ", (describe_target(trace), "bold")))
    for site in trace.sites:
        if atlas is not None and has_labels(site):
            show_labelled(trace, console, site, atlas, count)
        else:
            _print_entries(console, site, [(entry,) for entry in trace.top(count, site)])


def show_labelled(
    trace: Trace, console: Console, site: str, atlas: Labels, count: int = 10
) -> None:
    """Print the strongest neurons or heads with their labels."""
    _print_entries(console, site, labelled(trace, site, count, atlas), "label")


def _print_entries(
    console: Console,
    site: str,
    entries: Sequence[tuple[Entry] | tuple[Entry, str]],
    *more: str,
) -> None:
    """Print a table: of each entry where it is, its relevance, and what else there is of it."""
    fields = [
        name
        for name in ("layer", "position", "token", "feature")
        if entries and getattr(entries[0][0], name) is not None
    ]
    console.print(f"strongest entries of site {site}")
    table = Table(*fields, "relevance", *more, box=None, pad_edge=False)
    table.columns[len(fields)].justify = "right"
    for entry, *texts in entries:
        cells = [
            Text(repr(readable(entry.token)) if name == "token" and entry.token else str(value))
            for name in fields
            for value in [getattr(entry, name)]
        ]
        table.add_row(*cells, f"{entry.value:+.4g}", *(Text(printable(text)) for text in texts))
    console.print(table)


def _style(share: float) -> Style:
    background = colour(share)
    return Style(bgcolor=Color.from_rgb(*background), color=Color.from_rgb(*ink(background)))


def _legend(largest: float) -> Text:
    text = Text(f"{-largest:.3g} ")
    for cell in range(_LEGEND_CELLS):
        text.append(" ", _style(2 * cell / (_LEGEND_CELLS - 1) - 1))
    text.append(f" {largest:+.3g}   red: for the target, blue: against")
    return text


def _table(trace: Trace, values: NDArray[np.float32]) -> Table:
    table = Table("position", "token", "relevance", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[2].justify = "right"
    for position, (token, value) in enumerate(zip(trace.tokens, values, strict=True)):
        table.add_row(str(position), Text(repr(readable(token))), f"{value:+.4g}")
    return table
