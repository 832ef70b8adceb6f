"""A trace in the terminal: its tokens, coloured by relevance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from reltrace.types.neurons import Labels, has_labels, labelled
from reltrace.types.token_text import printable, quoted
from reltrace.types.trace import Trace
from reltrace.viz.colours import TokenValues, colour, scaled, text_colour, token_values
from reltrace.viz.words import Words, describe_target, entry_table, next_tokens, segments

_LEGEND_CELLS = 25

# A share of |R| on the first token that is reported, unless there are few tokens.
_HIGH_SHARE, _FEW_TOKENS = 0.5, 4


def show(trace: Trace, console: Console, atlas: Labels | None = None) -> None:
    """Print the target and the coloured tokens; the strongest entries if tokens have no values.

    Without colours (a pipe, NO_COLOR) it prints a table of the values instead. With an atlas it
    prints the strongest neurons and heads with their labels, too.
    """
    has_token_values = trace.provenance.reduction not in ("feature", "topk")
    shown = token_values(trace) if has_token_values else None
    behind = "" if shown is None else f": {shown.title}"
    console.print(
        Text.assemble("Relevance of ", (describe_target(trace), "bold"), printable(behind))
    )
    if likeliest := next_tokens(trace):
        console.print(Text(f"Likeliest next: {likeliest}"))
    if shown is not None:
        _show_tokens(trace, console, shown)
    for site in trace.sites:
        if shown is None or (atlas is not None and has_labels(site)):
            show_strongest(trace, console, site, atlas)


def _show_tokens(trace: Trace, console: Console, shown: TokenValues) -> None:
    share = trace.first_token_share(shown.site).total
    if share >= _HIGH_SHARE and len(trace.tokens) > _FEW_TOKENS:
        console.print(
            Text(
                f"The first token has {share:.0%} of |R| at site {printable(shown.site)}: it may "
                "draw attention whatever the prompt says (see NUMBERS.md, Limits)"
            )
        )
    if console.color_system is None or console.no_color:
        console.print(_table(trace, shown.values))
        return
    text, words, shares = Text(), Words.of(trace).texts, scaled(shown.values)
    for part in segments(trace):
        # Each turn, and what the chat template puts between turns, begins on a new line.
        if trace.turns and part.first:
            text.append("\n")
        if part.role:
            text.append(f"{printable(part.role)}: ", "bold")
        for position in range(part.first, part.stop):
            text.append(words[position], _style(float(shares[position])))
    console.print(text, soft_wrap=True)
    finite = np.abs(shown.values[np.isfinite(shown.values)])
    console.print(_legend(float(finite.max(initial=0))))


def show_strongest(
    trace: Trace, console: Console, site: str, atlas: Labels | None = None, count: int = 10
) -> None:
    """Print the strongest entries of a site, with their labels if the atlas has labels for it."""
    console.print(Text(f"strongest entries of site {printable(site)}"))
    entries, labels = trace.top(count, site), None
    if atlas is not None and has_labels(site):
        labels = [printable(label) for _, label in labelled(trace, site, count, atlas)]
    titles, rows = entry_table(entries, [quoted(name) for name in Words.of(trace).names])
    titles[-1] = "relevance"
    table = Table(*titles, box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    if labels is not None:
        table.add_column("label")
        rows = [[*row, label] for row, label in zip(rows, labels, strict=True)]
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _style(share: float) -> Style:
    background = colour(share)
    return Style(
        bgcolor=Color.from_rgb(*background), color=Color.from_rgb(*text_colour(background))
    )


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
            role = [Text(printable(part.role))] * bool(trace.turns)
            token = Text(quoted(names[position]))
            table.add_row(str(position), *role, token, f"{values[position]:+.4g}")
    return table
