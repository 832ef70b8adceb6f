"""`reltrace generate`: let a model write, and steer it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from reltrace.cli.options import (
    AsJson,
    Chat,
    Model,
    Prompt,
    Server,
    SpecialTokens,
    access_of,
    echo_hints,
    echo_json,
    input_of,
)
from reltrace.client.sync_client import TextStream
from reltrace.types.edit import Steer
from reltrace.types.errors import TraceError, invalid

_NEURON = re.compile(r"(\d+):(\d+)(=|\*)(\S+)")
_DIRECTION = re.compile(r"(\d+)\+(.+)")

_ARCHIVE = b"PK"
"""What .npz files begin with."""

_MOST_NUMBERS = 1 << 20
"""Of a direction: one for each feature of the residual stream, of which no model has more."""


def generate(
    context: typer.Context,
    prompt: Prompt = None,
    server: Server = None,
    model: Model = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_STEER",
            metavar="LAYER:NEURON=VALUE",
            help="Set a neuron, or multiply it (LAYER:NEURON*SCALE), or add a direction to the "
            "residual stream (LAYER+FILE.npy or LAYER+FILE.npy*SCALE); may be repeated. The text "
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
    chat: Chat = None,
    add_special_tokens: SpecialTokens = True,
    as_json: AsJson = False,
) -> None:
    """Let a model go on with a prompt, as it is and steered."""
    asked: dict[str, Any] = {
        **input_of(prompt, chat),
        "add_special_tokens": add_special_tokens,
        "steer": [steer_of(text) for text in steer or ()],
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "model": model,
    }
    with access_of(context).client(server) as client:
        # A file or a pipe must not get a text that begins again after it has begun.
        if sys.stdout.isatty() and not as_json:
            along = _write_beside if steer else _write_along
            stream = client.generate_stream(**asked)
            along(stream)
            if stream.result is not None:
                echo_hints(stream.result.hints)
            return
        found = client.generate(**asked)
    echo_hints(found.hints)
    if as_json:
        echo_json(found.to_dict())
    elif found.unsteered is None:
        typer.echo(found.text)
    else:
        Console().print(_side_by_side(found.text, found.unsteered.text))


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


def _write_beside(stream: TextStream) -> None:
    """Show both texts as they come."""
    texts = {True: "", False: ""}
    with Live(_side_by_side("", ""), console=Console()) as live:
        for piece in stream:
            before = "" if piece.again else texts[piece.steered]
            texts[piece.steered] = before + piece.text
            live.update(_side_by_side(texts[True], texts[False]))


def steer_of(text: str) -> Steer:
    """Read ``LAYER:NEURON=VALUE``, ``LAYER:NEURON*SCALE`` or ``LAYER+FILE``, ``LAYER+FILE*SCALE``.

    Raises
    ------
    InvalidArgument
        It is none of these, or the file holds no direction.
    """
    if neuron := _NEURON.fullmatch(text):
        number = _number(neuron[4])
        if number is not None and neuron[3] == "=":
            return Steer(int(neuron[1]), int(neuron[2]), value=number)
        if number is not None:
            return Steer(int(neuron[1]), int(neuron[2]), scale=number)
    elif direction := _DIRECTION.fullmatch(text):
        file, _, behind = direction[2].rpartition("*")
        scale = _number(behind) if file else None
        if scale is None:
            # The asterisk, if there is one, is the file's own.
            file = direction[2]
        return Steer(int(direction[1]), direction=_vector(Path(file)), scale=scale)
    raise invalid(
        "steer",
        "must be LAYER:NEURON=VALUE, LAYER:NEURON*SCALE, LAYER+FILE.npy or LAYER+FILE.npy*SCALE, "
        f"not {text!r}",
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _vector(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            if file.read(len(_ARCHIVE)) == _ARCHIVE:
                raise invalid("steer", f"{path} holds several arrays (.npz); a direction is one")
        # Mapped: what a header announces and the file does not have is no memory that is taken.
        found: NDArray[Any] = np.load(path, mmap_mode="r")
    except OSError as error:
        raise invalid("steer", f"{path} can not be read: {error.strerror or error}") from None
    except TraceError:
        raise
    except (ValueError, EOFError, OverflowError, MemoryError) as error:
        raise invalid("steer", f"{path} is no file of numpy.save's: {error}") from None
    if found.size > _MOST_NUMBERS:
        raise invalid("steer", f"{path} has {found.size} numbers; allowed: {_MOST_NUMBERS}")
    return np.array(found)


def _side_by_side(steered: str, plain: str) -> Table:
    table = Table(show_lines=False, expand=True)
    table.add_column("as it is", ratio=1)
    table.add_column("steered", ratio=1)
    # What models write is no markup.
    table.add_row(Text(plain), Text(steered))
    return table
