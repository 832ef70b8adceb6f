"""`reltrace evaluate`: which rule to trust on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from reltrace._command.options import (
    AsJson,
    Model,
    Server,
    TargetText,
    access_of,
    echo_json,
    target_of,
)
from reltrace._errors import invalid
from reltrace._evaluate.evaluation import Evaluation


def evaluate(
    context: typer.Context,
    source: Annotated[
        typer.FileText,
        typer.Argument(
            metavar="IN",
            help="File of prompts, -: standard input. A line is a prompt, or JSON with prompt or "
            "input_ids and, optionally, id, target and answer.",
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
        int, typer.Option(envvar="RELTRACE_POINTS", min=1, max=100, help="Steps of a curve.")
    ] = 10,
    seed: Annotated[
        int, typer.Option(envvar="RELTRACE_SEED", min=0, help="Of the random order.")
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option(envvar="RELTRACE_LIMIT", min=1, help="Only so many prompts."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_PLOT", metavar="FILE", help="Picture of the curves: png, svg or pdf."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well each rule tells what predictions rest on."""
    prompts = [_prompt(line, number) for number, line in enumerate(source, 1) if line.strip()]
    rules = rule or ["attnlrp", "cp_lrp", "gradient", "random"]
    with access_of(context).client(server) as client:
        found = client.evaluate(
            prompts[:limit],
            rules=rules,
            site=site,
            target=target_of(target),
            model=model,
            points=points,
            seed=seed,
        )
    if plot is not None:
        found.plot(plot)
    for key, error in found.failures.items():
        typer.echo(f"reltrace: prompt {key}: {error}", err=True)
    if as_json:
        echo_json(found.to_dict())
    else:
        Console().print(_table(found))
    if not found.prompts:
        raise typer.Exit(1)


def _prompt(line: str, number: int) -> Any:
    text = line.rstrip("\n")
    if not text.startswith(("{", '"')):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise invalid(f"line {number}", f"is not JSON: {error}") from None


def _table(found: Evaluation) -> Table:
    what = "tokens" if found.site == "embed" else "neurons"
    table = Table(title=f"{found.model}: {found.prompts} prompts, {what} switched off")
    table.add_column("rule")
    table.add_column("area between curves", justify="right")
    located = any(score.hit for score in found.rules.values())
    if located:
        table.add_column("answer is strongest", justify="right")
        table.add_column("positive relevance on it", justify="right")
    for rule, score in found.rules.items():
        cells = [rule, str(score.area)]
        if located:
            cells += [str(score.hit), str(score.mass)]
        table.add_row(*cells, style="bold" if rule == found.best() else "")
    table.caption = "mean ± half of the 95 % interval"
    return table
