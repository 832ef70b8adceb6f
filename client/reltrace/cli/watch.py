"""`--watch`: a view of the server that is drawn again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from reltrace.cli.options import echo_json

State = TypeVar("State")

Watch = Annotated[
    bool,
    typer.Option(
        "--watch", "-w", envvar="RELTRACE_WATCH", help="Show it again and again, until Ctrl-C."
    ),
]
Every = Annotated[
    float,
    typer.Option(envvar="RELTRACE_EVERY", min=0.1, help="With --watch: seconds between looks."),
]


@dataclass(frozen=True, slots=True)
class View:
    """What a command shows.

    Attributes
    ----------
    once : RenderableType
        For people.
    plain : Any
        The same for machines, as `echo_json` takes it.
    """

    once: RenderableType
    plain: Any


def show(look: Callable[[], View], *, watch: bool, every: float, as_json: bool) -> None:
    """Show a view, once or until Ctrl-C; with `as_json` a line of JSON per look."""
    if not watch:
        view = look()
        if as_json:
            echo_json(view.plain)
        else:
            Console().print(view.once)
        return
    try:
        if as_json:
            while True:
                echo_json(look().plain)
                time.sleep(every)
        with Live(look().once, auto_refresh=False, console=Console()) as live:
            while True:
                time.sleep(every)
                live.update(look().once, refresh=True)
    except KeyboardInterrupt:
        # That is how it ends.
        return
