"""What commands print: tables, lines of JSON, texts of others, and views that are drawn again."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from reltrace.cli.option_groups import option, option_group
from reltrace.types.token_text import JOINERS

AS_JSON = option(False, "Print JSON for machines.", "--json")
QUIET = option(False, "Show no progress.", "--quiet")


@option_group
class Watch:
    """The options of a view that may be drawn again and again."""

    watch: bool = option(False, "Show it again and again, until Ctrl-C.", "--watch", "-w")
    every: float = option(1.0, "With --watch: seconds between two views.", min=0.1)


def show(
    look: Callable[[], tuple[Any, RenderableType]], watch: Watch, *, as_json: bool = False
) -> None:
    """Show a view, once or until Ctrl-C."""
    if not watch.watch:
        value, drawn = look()
        if as_json:
            print_json(value)
        else:
            Console().print(drawn)
        return
    try:
        if as_json:
            while True:
                print_json(look()[0])
                time.sleep(watch.every)
        with Live(look()[1], auto_refresh=False, console=Console()) as live:
            while True:
                time.sleep(watch.every)
                live.update(look()[1], refresh=True)
    except KeyboardInterrupt:
        return


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Collection[str] = (),
    **style: Any,
) -> Table:
    """Return a table whose cells are no markup and hold no control characters."""
    made = Table(**style)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(safe(str(cell))) for cell in row))
    return made


def print_found(
    found: Any,
    as_json: bool,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    right: Collection[str] = (),
    *,
    empty: str = "",
    **style: Any,
) -> None:
    """Print what was found as JSON, or its rows as a table; `empty` if there are none."""
    if as_json:
        print_json(found)
    elif rows or not empty:
        Console().print(table(columns, rows, right, **style))
    else:
        typer.echo(empty)


def safe(text: str) -> str:
    """Return a text that can not control a terminal: control characters are escaped."""
    return "".join(
        repr(char)[1:-1]
        if char not in f"\n\t{JOINERS}" and unicodedata.category(char) in ("Cc", "Cf", "Cs")
        else char
        for char in text
    )


def write(text: str, *, end: str = "\n") -> None:
    """Print a text of others; a file or a pipe gets it as it is."""
    # Not typer.echo, which takes control characters away.
    print(safe(text) if sys.stdout.isatty() else text, end=end, flush=True)


def warn(*messages: str) -> None:
    """Print messages to standard error."""
    for message in messages:
        typer.echo(f"reltrace: {safe(message)}", err=True)


def print_json(value: Any) -> None:
    """Print a value, or dataclasses, as one line of JSON; times in ISO 8601."""
    typer.echo(json.dumps(value, default=_jsonable))


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
