"""`reltrace generate`: text of a model, also steered."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from reltrace.cli.connection import Connection
from reltrace.cli.option_groups import option
from reltrace.cli.options import MODEL, SEED, SPECIAL_TOKENS, PromptOptions
from reltrace.cli.output import AS_JSON, print_json, safe, warn, write
from reltrace.client.sync_client import TextStream
from reltrace.types.edit import Steer
from reltrace.types.errors import invalid

_NEURON = re.compile(r"(\d+):(\d+)(=|\*)(\S+)")
_DIRECTION = re.compile(r"(\d+)\+(.+)")

# Numbers of a direction, one for each feature of the residual stream.
_MAX_DIRECTION = 1 << 20


def generate(
    connection: Connection,
    prompt: PromptOptions,
    model: str | None = MODEL,
    steer: list[str] | None = option(
        None,
        "Set a neuron, or multiply it (LAYER:NEURON*SCALE), or add a direction to the "
        "residual stream (LAYER+FILE.npy or LAYER+FILE.npy*SCALE); may be repeated. The "
        "text without steering is shown next to it.",
        metavar="LAYER:NEURON=VALUE",
        show_default=False,
    ),
    max_new_tokens: int = option(64, "Write at most N tokens."),
    temperature: float = option(0.0, "0: always the likeliest token."),
    top_p: float = option(
        0.0, "Sample from the likeliest tokens whose probabilities add up to this; 0: from all."
    ),
    seed: int = SEED,
    add_special_tokens: bool = SPECIAL_TOKENS,
    as_json: bool = AS_JSON,
) -> None:
    """Let a model continue a prompt, without and with steering."""
    arguments: dict[str, Any] = {
        **prompt.arguments(),
        "add_special_tokens": add_special_tokens,
        "steer": [steer_of(text) for text in steer or ()],
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "model": model,
    }
    with connection.client() as client:
        # A text that is being written may start again, which a file or a pipe can not take back.
        if sys.stdout.isatty() and not as_json:
            stream = client.generate_stream(**arguments)
            (_show_both_texts if steer else _show_text)(stream)
            if stream.result is not None:
                warn(*stream.result.hints)
            return
        found = client.generate(**arguments)
    warn(*found.hints)
    if as_json:
        print_json(found.to_dict())
    elif found.unsteered is None:
        write(found.text)
    else:
        Console().print(_side_by_side(found.text, found.unsteered.text))


def _show_text(stream: TextStream) -> None:
    """Print a text while it is written; if it starts again, on a new line."""
    begun = False
    try:
        for piece in stream:
            write("\n" * piece.again + piece.text, end="")
            begun = True
    finally:
        # Also before the message of an error.
        if begun:
            typer.echo()


def _show_both_texts(stream: TextStream) -> None:
    texts = {True: "", False: ""}
    with Live(_side_by_side("", ""), console=Console()) as live:
        for piece in stream:
            before = "" if piece.again else texts[piece.steered]
            texts[piece.steered] = before + piece.text
            live.update(_side_by_side(texts[True], texts[False]))


def _side_by_side(steered: str, plain: str) -> Table:
    table = Table(expand=True)
    table.add_column("as it is", ratio=1)
    table.add_column("steered", ratio=1)
    table.add_row(Text(safe(plain)), Text(safe(steered)))
    return table


def steer_of(text: str) -> Steer:
    """Read ``LAYER:NEURON=VALUE`` or ``*SCALE``, or ``LAYER+FILE`` or ``LAYER+FILE*SCALE``."""
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
            # An asterisk, if there is one, is part of the name of the file.
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
    if path.suffix == ".npz":
        raise invalid("steer", f"{path} holds several arrays (.npz); a direction is one")
    try:
        # Mapped: a header that announces more than the file has does not take memory.
        found = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise invalid("steer", f"{path} can not be read: {error.strerror or error}") from None
    except (ValueError, OverflowError, MemoryError) as error:
        raise invalid("steer", f"{path} was not written by numpy.save: {error}") from None
    if found.size > _MAX_DIRECTION:
        raise invalid("steer", f"{path} has {found.size} numbers; allowed: {_MAX_DIRECTION}")
    return np.array(found)
