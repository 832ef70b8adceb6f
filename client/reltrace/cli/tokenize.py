"""`reltrace tokenize`: how a model reads a prompt."""

from __future__ import annotations

import typer
from rich.console import Console
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
from reltrace.types.token_text import quoted
from reltrace.viz.words import Words


def tokenize(
    context: typer.Context,
    prompt: Prompt = None,
    server: Server = None,
    model: Model = None,
    chat: Chat = None,
    add_special_tokens: SpecialTokens = True,
    as_json: AsJson = False,
) -> None:
    """Show the tokens that a model reads, without running it."""
    read = input_of(prompt, chat)
    with access_of(context).client(server) as client:
        found = client.tokenize(**read, add_special_tokens=add_special_tokens, model=model)
    echo_hints(found.hints)
    if as_json:
        echo_json(found.to_dict())
        return
    table = Table("position", "id", "token", "characters", box=None, pad_edge=False)
    for column in (0, 1, 3):
        table.columns[column].justify = "right"
    for position, name in enumerate(Words.of(found).names):
        first, stop = found.offsets[position]
        cells = [str(position), str(found.token_ids[position])]
        table.add_row(*cells, Text(quoted(name)), f"{first}:{stop}")
    Console().print(table)
