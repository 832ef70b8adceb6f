"""`reltrace evaluate`: which rule to trust on a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reltrace._batch.items import InputFormat, read_items
from reltrace._command.options import (
    AsJson,
    Column,
    IdColumn,
    Limit,
    Model,
    PromptFormat,
    Quiet,
    Server,
    TargetText,
    access_of,
    echo_json,
    target_of,
)
from reltrace._errors import invalid
from reltrace._evaluate.evaluation import Evaluation
from reltrace._evaluate.table import caption, table
from reltrace._pictures.curves import check_path

_ALSO = ("target", "answer")


def evaluate(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="File of prompts by its ending: txt, jsonl, csv, parquet (and .gz); -: standard "
            "input. A line of JSON has prompt or input_ids and, optionally, id, target and answer; "
            "so have columns.",
        ),
    ],
    server: Server = None,
    model: Model = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_EVALUATE_RULE",
            help="May be repeated. (default: attnlrp, cp_lrp, gradient, random)",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Literal["embed", "neuron"],
        typer.Option(
            envvar="RELTRACE_EVALUATE_SITE", help="What is switched off: tokens, or neurons."
        ),
    ] = "embed",
    target: TargetText = "max",
    points: Annotated[
        int, typer.Option(envvar="RELTRACE_POINTS", min=2, max=100, help="Steps of a curve.")
    ] = 10,
    seed: Annotated[
        int, typer.Option(envvar="RELTRACE_SEED", min=0, help="Of the random order.")
    ] = 0,
    input_format: PromptFormat = None,
    column: Column = None,
    id_column: IdColumn = None,
    limit: Limit = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_PLOT", metavar="FILE", help="Picture of the curves: png, svg or pdf."
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(envvar="RELTRACE_TIMEOUT", help="Seconds for the whole run."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well each rule tells what predictions rest on."""
    # Before anything is run: that may take long.
    if plot is not None:
        check_path(plot)
    path = None if source == "-" else Path(source)
    reading = InputFormat.of(
        path, input_format or ("jsonl" if path is None else None), column, id_column, _ALSO
    )
    prompts = list(islice(_prompts(path, reading), limit))
    with access_of(context).client(server) as client:
        found = client.evaluate(
            prompts,
            rules=rule or ["attnlrp", "cp_lrp", "gradient", "random"],
            site=site,
            target=target_of(target),
            model=model,
            points=points,
            seed=seed,
            progress=not quiet and sys.stderr.isatty(),
            timeout=timeout,
        )
    if as_json:
        echo_json(found.to_dict())
    # Of no prompt there is none, which is told instead.
    best = found.best()
    for key, error in found.failures.items():
        typer.echo(f"reltrace: prompt {key}: {error}", err=True)
    if not as_json:
        console = Console()
        # A table's own title is no wider than the table.
        console.print(Text(found.title))
        console.print(_table(found, best))
    if plot is not None:
        found.plot(plot)
        typer.echo(f"wrote {plot}", err=True)


def _prompts(path: Path | None, reading: InputFormat) -> Iterator[dict[str, Any]]:
    if path is not None and (path.is_dir() or not path.exists()):
        raise invalid("input", f"there is no file {str(path)!r}")
    with ExitStack() as stack:
        file = sys.stdin.buffer if path is None else stack.enter_context(path.open("rb"))
        for item in read_items(file, reading):
            if item.fault is not None:
                raise invalid(f"input, line {item.line}", str(item.fault))
            yield {"id": item.id, **item.arguments}


def _table(found: Evaluation, best: str) -> Table:
    titles, rows = table(found)
    shown = Table(caption=caption(found))
    for place, title in enumerate(titles):
        shown.add_column(title, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row, style="bold" if row[0] == best else "")
    return shown
