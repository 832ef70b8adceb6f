"""`reltrace generate`: let a model write, and steer it."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reltrace._command.options import AsJson, Model, Server, access_of, echo_json
from reltrace._edit import Steer
from reltrace._errors import invalid
from reltrace._generation import Generation
from reltrace._text_stream import TextStream

_STEER = re.compile(r"(\d+):(\d+)(=|\*)(\S+)")


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the model goes on with.")],
    server: Server = None,
    model: Model = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_STEER",
            metavar="LAYER:NEURON=VALUE",
            help="Set a neuron, or multiply it (LAYER:NEURON*SCALE); may be repeated. The text "
            "without it is shown beside.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(envvar="RELTRACE_MAX_NEW_TOKENS", help="At most so many tokens.")
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(envvar="RELTRACE_TEMPERATURE", help="0: always the likeliest token."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_TOP_P",
            help="Draw from the likeliest that have this much probability together; 0: from all.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(envvar="RELTRACE_SEED", help="Of the draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a model go on with a prompt, as it is and steered."""
    asked: dict[str, Any] = {
        "steer": [steer_of(text) for text in steer or ()],
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "model": model,
    }
    with access_of(context).client(server) as client:
        # A file or a pipe must not get a text that begins again after it has begun.
        if sys.stdout.isatty() and not steer and not as_json:
            _write_along(client.generate_stream(prompt, **asked))
            return
        found = client.generate(prompt, **asked)
    if as_json:
        echo_json(found.to_dict())
    elif found.unsteered is None:
        typer.echo(found.text)
    else:
        Console().print(_side_by_side(found, found.unsteered))


def _write_along(stream: TextStream) -> None:
    """Print a text as it comes; one that begins again does so on a new line."""
    begun = False
    try:
        for piece in stream:
            typer.echo("\n" * piece.again + piece.text, nl=False)
            sys.stdout.flush()
            begun = True
    finally:
        # What an error says stands on a line of its own too.
        if begun:
            typer.echo()


def steer_of(text: str) -> Steer:
    """Read ``LAYER:NEURON=VALUE`` or ``LAYER:NEURON*SCALE``.

    Raises
    ------
    InvalidArgument
        It is neither.
    """
    found = _STEER.fullmatch(text)
    try:
        number = float(found[4]) if found else None
    except ValueError:
        number = None
    if found is None or number is None:
        raise invalid("steer", f"must be LAYER:NEURON=VALUE or LAYER:NEURON*SCALE, not {text!r}")
    layer, neuron = int(found[1]), int(found[2])
    return (
        Steer(layer, neuron, value=number)
        if found[3] == "="
        else Steer(layer, neuron, scale=number)
    )


def _side_by_side(steered: Generation, plain: Generation) -> Table:
    table = Table(show_lines=False)
    table.add_column("as it is", ratio=1)
    table.add_column("steered", ratio=1)
    # What models write is no markup.
    table.add_row(Text(plain.text), Text(steered.text))
    return table
