"""`reltrace tokenize`: how a model reads a prompt."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reltrace._command.options import (
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
    table = Table("position", "id", "token", "text", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[1].justify = "right"
    texts = [repr(found.text[first:stop]) for first, stop in found.offsets.tolist()]
    for position, number in enumerate(found.token_ids):
        cells = [Text(found.tokens[position]), Text(texts[position])]
        table.add_row(str(position), str(number), *cells)
    Console().print(table)
