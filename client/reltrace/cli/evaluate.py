"""`reltrace evaluate`: which rule to trust on a model."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.text import Text

from reltrace.cli.connection import Connection
from reltrace.cli.option_groups import argument, option
from reltrace.cli.options import (
    CONTRAST,
    LIMIT,
    LOGPROB,
    MODEL,
    SEED,
    TIMEOUT,
    FileOptions,
    PromptFile,
    file_of,
    target_of,
)
from reltrace.cli.output import AS_JSON, QUIET, print_json, table, warn
from reltrace.evaluation.evaluation import caption, verdict
from reltrace.evaluation.evaluation import table as table_of
from reltrace.evaluation.settings import Keep, Measure
from reltrace.types.target import Target
from reltrace.viz.files import check_path


def evaluate(
    connection: Connection,
    reading: FileOptions,
    source: str = argument(
        ...,
        "File of prompts by its ending: txt, jsonl, csv, parquet (and .gz); -: standard "
        "input. A line of JSON has prompt, messages or input_ids, and optionally id, target "
        "and answer; columns are prompt, id, target and answer.",
        metavar="IN",
    ),
    model: str | None = MODEL,
    rule: list[str] | None = option(
        None, "May be repeated.", show_default="attnlrp, cp_lrp, gradient, random"
    ),
    site: Literal["embed", "neuron"] = option("embed", "What is switched off: tokens, or neurons."),
    target: str = option(
        "max",
        'What is explained: "max" (the largest logit), a text of one token or several '
        "that follows the prompt, or id:N.",
    ),
    contrast: str | None = CONTRAST,
    logprob: bool = LOGPROB,
    measure: Measure = option(
        "logprob", "Quantity of the target that is measured while tokens are replaced."
    ),
    replace: str = option(
        "zero", "Replacement of tokens: zero, mean (of all embeddings), a token, or id:N."
    ),
    keep: Keep = option(
        "special", "Tokens that are never replaced: special (the first and special ones) or none."
    ),
    points: int = option(10, "Steps of a curve.", min=2, max=100),
    seed: int = SEED,
    limit: int | None = LIMIT,
    plot: Path | None = option(None, "Picture of the curves: png, svg or pdf.", metavar="FILE"),
    timeout: float | None = TIMEOUT,
    quiet: bool = QUIET,
    as_json: bool = AS_JSON,
) -> None:
    """Measure how faithfully each rule explains predictions.

    Exit code 1 if a prompt could not be evaluated.
    """
    # Checked before the evaluation, which may take long.
    if plot is not None:
        check_path(plot, pages=False)
    path = file_of(source)
    file = PromptFile(path, reading.format_of(path, "target", "answer"))
    prompts = list(islice(file, limit))
    with connection.client() as client:
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
        print_json(found.to_dict())
    # Raises an error if there is no prompt left to compare rules on.
    best = found.best()
    warn(*(f"prompt {key}: {error}" for key, error in found.failures.items()))
    if not as_json:
        console = Console()
        # Not the table's own title, which is no wider than the table.
        console.print(Text(found.title))
        titles, rows = table_of(found)
        drawn = table(titles, rows, right=titles[1:], caption=caption(found))
        for row, cells in zip(drawn.rows, rows, strict=True):
            row.style = "bold" if best == (cells[0],) else ""
        console.print(drawn)
        console.print(Text(verdict(found)))
    warn(*(f"warning: {warning}" for warning in found.warnings))
    if plot is not None:
        found.plot(plot)
        typer.echo(f"wrote {plot}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _target(text: str, contrast: str | None, logprob: bool) -> Target | str | int:
    target = target_of(text)
    if contrast is None and not logprob:
        # The text may have several tokens, which a Target does not allow.
        return target
    subtracted = None if contrast is None else target_of(contrast, "contrast")
    return Target(target, contrast=subtracted, logprob=logprob)
