"""What commands print: tables, JSON, text of models and servers, and views that are refreshed."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
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

AS_JSON = option(False, "Print JSON.", "--json")
QUIET = option(False, "Show no progress.", "--quiet")


def prepare_streams() -> None:
    """Make the standard streams take every character, replaced where their encoding lacks it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # Closed, as by `>&-`.
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Write nothing more to standard output if it can not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        # What its buffer holds would be an error once more, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@option_group
class Watch:
    """The options of a view that may be refreshed."""

    watch: bool = option(False, "Refresh the view until Ctrl-C.", "--watch", "-w")
    every: float = option(1.0, "With --watch: seconds between two views.", min=0.1)


def show(
    fetch: Callable[[], tuple[Any, RenderableType]], watch: Watch, *, as_json: bool = False
) -> None:
    """Print what `fetch` returns, the value as JSON or else the view; once or until Ctrl-C."""
    live = Live(auto_refresh=False, console=Console()) if watch.watch and not as_json else None

    def show_once() -> None:
        value, view = fetch()
        if as_json:
            print_json(value)
        elif live is None:
            Console().print(view)
        else:
            live.update(view, refresh=True)

    if not watch.watch:
        show_once()
        return
    with suppress(KeyboardInterrupt), live or nullcontext():
        while True:
            show_once()
            time.sleep(watch.every)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Collection[str] = (),
    **style: Any,
) -> Table:
    """Return a table; its cells are text, not markup, with control characters escaped."""
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
    """Print a text of a model or server: escaped on a terminal, unchanged to a file or a pipe."""
    # Not typer.echo, which removes control characters.
    print(safe(text) if sys.stdout.isatty() else text, end=end, flush=True)


class LogHandler(logging.Handler):
    """Prints log messages to standard error, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"reltrace: {safe(record.getMessage())}"
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            typer.echo(text, err=True)


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
