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

from reltrace.types.neurons import Labels, has_labels, labelled
from reltrace.types.token_text import printable, quoted
from reltrace.types.top_entries import Entry
from reltrace.types.trace import Trace
from reltrace.viz.colours import colour, ink, scaled, token_values
from reltrace.viz.words import Words, describe_target, entry_table, next_tokens, segments

_LEGEND_CELLS = 25

# A share of |R| on the first token that is reported, unless there are few tokens.
_HIGH_SHARE, _FEW_TOKENS = 0.5, 4


def show(trace: Trace, console: Console) -> None:
    """Print the target, the coloured tokens and a legend; see `token_values` for what is shown.

    Without colours (a pipe, NO_COLOR) it prints a table of the values instead.
    """
    shown = token_values(trace)
    _print_target(trace, console, f": {shown.title}")
    share = trace.first_token_share(shown.site).total
    if share >= _HIGH_SHARE and len(trace.tokens) > _FEW_TOKENS:
        console.print(
            f"The first token has {share:.0%} of |R| at site {shown.site}: it may draw attention "
            "whatever the prompt says (see NUMBERS.md, Limits)"
        )
    if console.color_system is None or console.no_color:
        console.print(_table(trace, shown.values))
        return
    text, words, shares = Text(), Words.of(trace).texts, scaled(shown.values)
    for part in segments(trace):
        # What the chat template puts around a turn is on lines of its own.
        text.append(f"{chr(10) * (part.first > 0)}{part.role}: " if part.role else "", "bold")
        text.append("\n" if trace.turns and not part.role and part.first else "")
        for position in range(part.first, part.stop):
            text.append(words[position], _style(float(shares[position])))
    console.print(text, soft_wrap=True)
    finite = np.abs(shown.values[np.isfinite(shown.values)])
    console.print(_legend(float(finite.max()) if finite.size else 0.0))


def show_entries(
    trace: Trace, console: Console, count: int = 10, atlas: Labels | None = None
) -> None:
    """Print the strongest entries of each site, for reductions that leave no value per token."""
    _print_target(trace, console)
    for site in trace.sites:
        if atlas is not None and has_labels(site):
            show_labelled(trace, console, site, atlas, count)
        else:
            console.print(f"strongest entries of site {site}")
            _print_entries(trace, console, trace.top(count, site))


def show_labelled(
    trace: Trace, console: Console, site: str, atlas: Labels, count: int = 10
) -> None:
    """Print the strongest neurons or heads with their labels."""
    console.print(f"strongest entries of site {site}")
    found = labelled(trace, site, count, atlas)
    labels = [label for _, label in found]
    _print_entries(trace, console, [entry for entry, _ in found], labels)


def _print_target(trace: Trace, console: Console, behind: str = "") -> None:
    console.print(Text.assemble("Relevance of ", (describe_target(trace), "bold"), behind))
    if likeliest := next_tokens(trace):
        console.print(Text(f"Likeliest next: {likeliest}"))


def _print_entries(
    trace: Trace, console: Console, entries: Sequence[Entry], labels: Sequence[str] | None = None
) -> None:
    titles, rows = entry_table(entries, [quoted(name) for name in Words.of(trace).names])
    titles[-1] = "relevance"
    table = Table(*titles, box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    if labels is not None:
        table.add_column("label")
        rows = [[*row, printable(label)] for row, label in zip(rows, labels, strict=True)]
    for row in rows:
        table.add_row(*map(Text, row))
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
    columns = ["position", *["role"] * bool(trace.turns), "token", "relevance"]
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[0].justify = table.columns[-1].justify = "right"
    names = Words.of(trace).names
    for part in segments(trace):
        for position in range(part.first, part.stop):
            role = [Text(part.role)] * bool(trace.turns)
            token = Text(quoted(names[position]))
            table.add_row(str(position), *role, token, f"{values[position]:+.4g}")
    return table
