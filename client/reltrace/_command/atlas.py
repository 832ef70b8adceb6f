"""`reltrace atlas`: where in a corpus every neuron and head is strongest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import reltrace
from reltrace._atlas.part import LISTS
from reltrace._command.options import (
    AsJson,
    Model,
    Rule,
    Server,
    TargetText,
    access_of,
    echo_json,
    target_of,
)

app = typer.Typer(no_args_is_help=True, help="Where in a corpus neurons and heads are strongest.")

_BEFORE, _AFTER = 24, 8
"""Tokens that are shown before and after the one that is strong."""


@app.command()
def build(
    context: typer.Context,
    corpus: Annotated[
        typer.FileText,
        typer.Argument(metavar="CORPUS", help="A prompt per line; -: standard input."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder; one that is there is gone on with.")
    ],
    server: Server = None,
    model: Model = None,
    rule: Rule = "attnlrp",
    target: TargetText = "max",
    k: Annotated[
        int, typer.Option("--places", envvar="RELTRACE_PLACES", help="Places of each list.")
    ] = 16,
    slice_: Annotated[
        int,
        typer.Option("--slice", envvar="RELTRACE_SLICE", help="Prompts a worker takes at a time."),
    ] = 1024,
    as_json: AsJson = False,
) -> None:
    """Build an atlas, or what is missing of one."""
    lines = (line.rstrip("\n") for line in corpus)
    with access_of(context).client(server) as client:
        found = client.build_atlas(
            (line for line in lines if line.strip()),
            out,
            model=model,
            rule=rule,
            target=target_of(target),
            k=k,
            slice=slice_,
        )
    if as_json:
        echo_json({**found.about, "tokens": found.tokens, "skipped": found.skipped})
    else:
        left_out = f", {len(found.skipped)} prompts left out" if found.skipped else ""
        typer.echo(f"{out}: {found.tokens} tokens{left_out}")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Of the atlas.")],
    layer: Annotated[int, typer.Argument(help="Decoder layer, from 0.")],
    index: Annotated[int, typer.Argument(metavar="NEURON", help="Neuron, or head, from 0.")],
    site: Annotated[
        Literal["neuron", "head"], typer.Option(envvar="RELTRACE_ATLAS_SITE", help="Which.")
    ] = "neuron",
    measure: Annotated[
        Literal["relevance", "activation"],
        typer.Option(envvar="RELTRACE_ATLAS_MEASURE", help="By which its places are strong."),
    ] = "relevance",
    as_json: AsJson = False,
) -> None:
    """Show the places where a neuron or head is strongest."""
    atlas = reltrace.load_atlas(folder)
    found = atlas.neuron(layer, index) if site == "neuron" else atlas.head(layer, index)
    names = [name for name in LISTS if name.startswith(measure)]
    if as_json:
        echo_json(
            {
                name: [
                    {
                        "value": c.value,
                        "prompt": c.prompt,
                        "position": c.position,
                        "tokens": c.tokens,
                    }
                    for c in found.contexts[name]
                ]
                for name in names
            }
        )
        return
    table = Table(title=f"{site} {index} of layer {layer}: {found.count} tokens, mean {measure} "
                  f"{found.mean[measure]:.3g}")  # fmt: skip
    table.add_column(measure, justify="right")
    table.add_column("where")
    for name in names:
        for place in found.contexts[name]:
            table.add_row(f"{place.value:+.4g}", _line(place))
    Console().print(table)


def _line(place: reltrace.Context) -> Text:
    """Return the tokens around a place, the one that is strong in colour."""
    line = Text()
    start = max(0, place.position - _BEFORE)
    if start:
        line.append("… ")
    for index in range(start, min(len(place.tokens), place.position + _AFTER + 1)):
        text = place.tokens[index].replace("Ġ", " ").replace("▁", " ").replace("\n", " ")
        strong = "bold red" if place.value > 0 else "bold blue"
        line.append(text, style=strong if index == place.position else "")
    if place.position + _AFTER + 1 < len(place.tokens):
        line.append(" …")
    return line
