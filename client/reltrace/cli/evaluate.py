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

from reltrace.batch.items import InputFormat, read_items
from reltrace.cli.options import (
    AsJson,
    Column,
    IdColumn,
    Limit,
    Model,
    PromptFormat,
    Quiet,
    Server,
    access_of,
    echo_json,
    target_of,
)
from reltrace.evaluation.evaluation import Evaluation
from reltrace.evaluation.plan import Keep, Measure
from reltrace.evaluation.table import caption, table, verdict
from reltrace.types.errors import invalid
from reltrace.types.target import Target
from reltrace.viz.curves import check_path

_ALSO = ("target", "answer")


def evaluate(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="File of prompts by its ending: txt, jsonl, csv, parquet (and .gz); -: standard "
            "input. A line of JSON has prompt, messages or input_ids, and optionally id, target "
            "and answer; columns are prompt, id, target and answer.",
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
    target: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_TARGET",
            help='What is explained: "max" (the largest logit), a text of one token or several '
            "that follows the prompt, or id:N.",
        ),
    ] = "max",
    contrast: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_CONTRAST",
            help="A token, or id:N, whose logit is subtracted; the target is a token then.",
        ),
    ] = None,
    logprob: Annotated[
        bool,
        typer.Option(
            "--logprob",
            envvar="RELTRACE_LOGPROB",
            help="Explain the target's log-probability instead of its logit.",
        ),
    ] = False,
    measure: Annotated[
        Measure,
        typer.Option(
            envvar="RELTRACE_MEASURE", help="What of the target is measured as tokens go."
        ),
    ] = "logprob",
    replace: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_REPLACE",
            help="What takes the place of tokens: zero, mean (of all embeddings), a token, or "
            "id:N.",
        ),
    ] = "zero",
    keep: Annotated[
        Keep,
        typer.Option(
            envvar="RELTRACE_KEEP",
            help="Tokens that stay: special (the first one and special ones) or none.",
        ),
    ] = "special",
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
    """Measure how well each rule tells what predictions rest on.

    Exit code 1 if a prompt could not be evaluated.
    """
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
            target=_target(target, contrast, logprob),
            measure=measure,
            replace=target_of(replace, "replace"),
            keep=keep,
            model=model,
            points=points,
            seed=seed,
            progress=not quiet and sys.stderr.isatty(),
            timeout=timeout,
        )
    if as_json:
        echo_json(found.to_dict())
    # Of no prompt there is none, which is told instead.
    found.best()
    for key, error in found.failures.items():
        typer.echo(f"reltrace: prompt {key}: {error}", err=True)
    if not as_json:
        console = Console()
        # A table's own title is no wider than the table.
        console.print(Text(found.title))
        console.print(_table(found))
        console.print(Text(verdict(found)))
    for warning in found.warnings:
        typer.echo(f"reltrace: warning: {warning}", err=True)
    if plot is not None:
        found.plot(plot)
        typer.echo(f"wrote {plot}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _target(text: str, contrast: str | None, logprob: bool) -> Target | str | int:
    target = target_of(text)
    if contrast is None and not logprob:
        return target
    beside = None if contrast is None else target_of(contrast, "contrast")
    return Target(target, contrast=beside, logprob=logprob)


def _prompts(path: Path | None, reading: InputFormat) -> Iterator[dict[str, Any]]:
    if path is not None and (path.is_dir() or not path.exists()):
        raise invalid("input", f"there is no file {str(path)!r}")
    with ExitStack() as stack:
        file = sys.stdin.buffer if path is None else stack.enter_context(path.open("rb"))
        for item in read_items(file, reading):
            if item.fault is not None:
                raise invalid(f"input, line {item.line}", str(item.fault))
            yield {"id": item.id, **item.arguments}


def _table(found: Evaluation) -> Table:
    titles, rows = table(found)
    best = found.best()
    shown = Table(caption=caption(found))
    for place, title in enumerate(titles):
        shown.add_column(title, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row, style="bold" if best == (row[0],) else "")
    return shown
