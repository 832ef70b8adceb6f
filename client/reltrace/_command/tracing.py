"""`reltrace run`: one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reltrace._command.options import (
    Dtype,
    Layers,
    Model,
    Reduce,
    Rule,
    Server,
    Sites,
    TargetText,
    TopK,
    access_of,
    target_of,
)
from reltrace._pictures import terminal
from reltrace._trace import Trace, check_plot_path


def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to trace.")],
    server: Server = None,
    model: Model = None,
    target: TargetText = "max",
    rule: Rule = "attnlrp",
    site: Sites = None,
    reduce: Reduce = "token",
    top_k: TopK = None,
    layer: Layers = None,
    dtype: Dtype = "float32",
    plot: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_PLOT",
            help="Write the layers-by-tokens heatmap: a .png, .svg or .pdf file, or .html for a "
            "page with hover values.",
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            envvar="RELTRACE_JSON_FILE",
            metavar="FILE|-",
            help="Write the trace as one JSON object; -: to standard output, and nothing else.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(envvar="RELTRACE_TIMEOUT", help="Seconds for the whole call."),
    ] = None,
) -> None:
    """Trace one prompt and show its tokens coloured by relevance."""
    if plot is not None:
        check_plot_path(plot)
    with access_of(context).client(server) as client:
        trace = client.trace(
            prompt,
            model=model,
            sites=site or ["resid"],
            reduce=reduce,
            target=target_of(target),
            rule=rule,
            dtype=dtype,
            layers=layer or None,
            top_k=top_k,
            timeout=timeout,
        )
    if json_file == "-":
        typer.echo(json.dumps(trace.to_dict(), allow_nan=False))
    else:
        _show(trace)
        if json_file is not None:
            Path(json_file).write_text(json.dumps(trace.to_dict(), allow_nan=False) + "\n")
    if plot is not None:
        trace.plot(plot)
        typer.echo(f"wrote {plot}", err=True)


def _show(trace: Trace) -> None:
    console = Console()
    if trace.provenance.reduction == "feature":
        # Nothing in it belongs to a token.
        console.print(repr(trace), markup=False, highlight=False)
    else:
        terminal.show(trace, console)
