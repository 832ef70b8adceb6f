"""`reltrace tokenize`: how a model reads a prompt."""

from __future__ import annotations

from rich.console import Console

from reltrace.cli.connection import Connection
from reltrace.cli.options import Model, PromptOptions, SpecialTokens
from reltrace.cli.output import AsJson, plain_table, print_json, warn
from reltrace.types.token_text import quoted
from reltrace.viz.words import Words


def tokenize(
    connection: Connection,
    prompt: PromptOptions,
    model: Model = None,
    add_special_tokens: SpecialTokens = True,
    as_json: AsJson = False,
) -> None:
    """Show the tokens that a model reads, without running it."""
    arguments = prompt.arguments()
    with connection.client() as client:
        found = client.tokenize(**arguments, add_special_tokens=add_special_tokens, model=model)
    warn(*found.hints)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [
        (position, token_id, quoted(name), f"{first}:{stop}")
        for position, (token_id, name, (first, stop)) in enumerate(
            zip(found.token_ids, Words.of(found).names, found.offsets.tolist(), strict=True)
        )
    ]
    columns = ("position", "id", "token", "characters")
    Console().print(plain_table(columns, rows, right=("position", "id", "characters")))
