"""`reltrace run`: one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reltrace._command.options import Server, access_of
from reltrace._errors import invalid
from reltrace._pictures import terminal
from reltrace._trace import Trace, check_plot_path

_ID_PREFIX = "id:"


def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to trace.")],
    server: Server = None,
    model: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_MODEL", help="Name of a served model; default: the only one."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_TARGET",
            help='What is explained: "max" (the largest logit), a token\'s text, or id:N.',
        ),
    ] = "max",
    rule: Annotated[
        str, typer.Option(envvar="RELTRACE_RULE", help="Propagation rule.")
    ] = "attnlrp",
    site: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_SITE",
            help="Where relevance is read; may be repeated.  [default: resid]",
            show_default=False,
        ),
    ] = None,
    reduce: Annotated[
        str, typer.Option(envvar="RELTRACE_REDUCE", help="What is summed: token, feature, full.")
    ] = "token",
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
            target=_target(target),
            rule=rule,
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


def _target(text: str) -> str | int:
    if not text.startswith(_ID_PREFIX):
        return text
    number = text.removeprefix(_ID_PREFIX)
    if not (number.isascii() and number.isdigit()):
        raise invalid("target", f"after {_ID_PREFIX} comes a token id, not {number!r}")
    return int(number)


def _show(trace: Trace) -> None:
    console = Console()
    if trace.provenance.reduction == "feature":
        # Nothing in it belongs to a token.
        console.print(repr(trace), markup=False, highlight=False)
    else:
        terminal.show(trace, console)
