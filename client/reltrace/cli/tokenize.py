"""`reltrace tokenize`: how a model reads a prompt."""

from __future__ import annotations

from reltrace.cli.connection import Connection
from reltrace.cli.options import MODEL, SPECIAL_TOKENS, PromptOptions
from reltrace.cli.output import AS_JSON, print_found, warn
from reltrace.types.token_text import quoted
from reltrace.viz.words import Words


def tokenize(
    connection: Connection,
    prompt: PromptOptions,
    model: str | None = MODEL,
    add_special_tokens: bool = SPECIAL_TOKENS,
    as_json: bool = AS_JSON,
) -> None:
    """Show the tokens that a model reads, without running it."""
    arguments = prompt.arguments()
    with connection.client() as client:
        found = client.tokenize(**arguments, add_special_tokens=add_special_tokens, model=model)
    warn(*found.hints)
    spans = [f"{first}:{stop}" for first, stop in found.offsets.tolist()]
    names = map(quoted, Words.of(found).names)
    rows = list(zip(range(len(spans)), found.token_ids, names, spans, strict=True))
    columns = ("position", "id", "token", "characters")
    right = ("position", "id", "characters")
    print_found(found.to_dict(), as_json, columns, rows, right, box=None, pad_edge=False)
