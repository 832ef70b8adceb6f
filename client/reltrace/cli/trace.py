"""`reltrace run`: one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import reltrace
from reltrace.cli.options import (
    Chat,
    Dtype,
    Layers,
    Model,
    Prompt,
    Reduce,
    Rule,
    Server,
    Sites,
    SpecialTokens,
    TargetText,
    TopK,
    access_of,
    echo_hints,
    input_of,
    target_of,
)
from reltrace.types.errors import invalid
from reltrace.types.neurons import has_labels
from reltrace.types.target import Target
from reltrace.types.trace import Trace
from reltrace.viz import terminal
from reltrace.viz.file import check_path


def run(
    context: typer.Context,
    prompt: Prompt = None,
    server: Server = None,
    model: Model = None,
    target: TargetText = "max",
    rule: Rule = "attnlrp",
    site: Sites = None,
    reduce: Reduce = "token",
    top_k: TopK = None,
    layer: Layers = None,
    dtype: Dtype = "float32",
    position: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_POSITION",
            help="Of the token whose next token is explained; negative: from the end.",
        ),
    ] = -1,
    contrast: Annotated[
        str | None,
        typer.Option(envvar="RELTRACE_CONTRAST", help="Subtract this token (a text, or id:N)."),
    ] = None,
    continuation: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_CONTINUATION",
            help="Explain these tokens after the prompt instead of --target.",
        ),
    ] = None,
    logprob: Annotated[
        bool,
        typer.Option(
            "--logprob", envvar="RELTRACE_LOGPROB", help="Log-probability instead of logit."
        ),
    ] = False,
    chat: Chat = None,
    add_special_tokens: SpecialTokens = True,
    input_ids: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_INPUT_IDS",
            metavar="N,N,...",
            help="Token ids instead of PROMPT, used as they are.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(envvar="RELTRACE_SAVE", help="Write the trace to a .safetensors file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_PLOT",
            help="Write the layers-by-tokens heatmap: a .png, .svg or .pdf file, or .html for a "
            "page with hover values.",
        ),
    ] = None,
    atlas: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_ATLAS",
            metavar="FOLDER",
            help="Label the strongest neurons and heads, here and in an .html plot: an atlas of "
            "the model.",
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
    read = input_of(prompt, chat, input_ids)
    if plot is not None:
        check_path(plot, with_labels=atlas is not None)
    # Before anything is traced: that may take long.
    labels = None if atlas is None else _labels(atlas, site or [], reduce)
    asked = Target(
        target_of(target),
        position,
        None if contrast is None else target_of(contrast, "contrast"),
        continuation,
        logprob,
    )
    # A type checker gives up on so many arguments that may be None, each in two overloads.
    options: dict[str, Any] = {
        **read,
        "add_special_tokens": add_special_tokens,
        "model": model,
        "sites": site or ["resid"],
        "reduce": reduce,
        "rule": rule,
        "dtype": dtype,
        "layers": layer or None,
        "top_k": top_k,
        "timeout": timeout,
    }
    with access_of(context).client(server) as client:
        trace = client.trace(target=asked, **options)
    echo_hints(trace.hints)
    if json_file == "-":
        typer.echo(json.dumps(trace.to_dict(), allow_nan=False))
    else:
        _show(trace, labels)
        if json_file is not None:
            Path(json_file).write_text(json.dumps(trace.to_dict(), allow_nan=False) + "\n")
    if save is not None:
        trace.save(save)
        typer.echo(f"wrote {save}", err=True)
    if plot is not None:
        trace.plot(plot, atlas=labels)
        typer.echo(f"wrote {plot}", err=True)


def _labels(folder: Path, sites: list[str], reduce: str) -> reltrace.Atlas:
    """Read an atlas, for a trace that has what it labels."""
    if reduce == "token" or not any(map(has_labels, sites)):
        raise invalid(
            "atlas",
            "labels neurons and heads: ask for them, with --site neuron or --site head and "
            "--reduce full, or topk and --top-k",
        )
    return reltrace.load_atlas(folder)


def _show(trace: Trace, labels: reltrace.Atlas | None) -> None:
    console = Console()
    if trace.provenance.reduction in ("feature", "topk"):
        # No value belongs to a token alone.
        terminal.show_entries(trace, console, atlas=labels)
        return
    terminal.show(trace, console)
    if labels is not None:
        for site in filter(has_labels, trace.sites):
            terminal.show_labelled(trace, console, site, labels)
