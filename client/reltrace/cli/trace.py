"""`reltrace trace`: one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import reltrace
from reltrace.cli.connection import Connection
from reltrace.cli.option_groups import option
from reltrace.cli.options import CONTRAST, LOGPROB, TIMEOUT, PromptOptions, TraceOptions, target_of
from reltrace.cli.output import warn
from reltrace.storage.atomic_files import check_writable, with_filename
from reltrace.types.errors import invalid
from reltrace.types.neurons import has_labels
from reltrace.types.target import Target
from reltrace.viz import terminal
from reltrace.viz.files import check_path


def trace(
    connection: Connection,
    prompt: PromptOptions,
    options: TraceOptions,
    position: int = option(
        -1, "Position of the token whose next token is explained; negative: from the end."
    ),
    contrast: str | None = CONTRAST,
    continuation: str | None = option(
        None, "Explain these tokens after the prompt instead of --target."
    ),
    logprob: bool = LOGPROB,
    input_ids: str | None = option(
        None, "Token ids instead of PROMPT, used as they are.", metavar="N,N,..."
    ),
    save: Path | None = option(None, "Write the trace to a .safetensors file."),
    plot: Path | None = option(
        None,
        "Write the layers-by-tokens heatmap: a .png, .svg or .pdf file, or .html for a "
        "page with hover values.",
    ),
    atlas: Path | None = option(
        None,
        "Atlas of the model, for labels of the strongest neurons and heads, also in an .html plot.",
        metavar="FOLDER",
    ),
    json_file: str | None = option(
        None,
        "Write the trace as one JSON object; -: to standard output, and nothing else.",
        "--json",
        metavar="FILE|-",
    ),
    timeout: float | None = TIMEOUT,
) -> None:
    """Trace one prompt and show its tokens coloured by relevance."""
    text = prompt.arguments(input_ids)
    if plot is not None:
        check_path(plot, with_labels=atlas is not None)
    if save is not None:
        check_writable(save, "save")
    if json_file is not None and json_file != "-":
        check_writable(Path(json_file), "json")
    # Checked before the trace, which may take long.
    labels = None if atlas is None else _labels(atlas, options)
    wanted = Target(
        target_of(options.target),
        position,
        None if contrast is None else target_of(contrast, "contrast"),
        continuation,
        logprob,
    )
    # Any: a type checker gives up on so many arguments in two overloads.
    arguments: dict[str, Any] = {**text, **options.arguments(), "timeout": timeout}
    with connection.client() as client:
        found = client.trace(target=wanted, **arguments)
    warn(*found.hints)
    # Files first: standard output may be a pipe whose reader ends.
    if save is not None:
        found.save(save)
        typer.echo(f"wrote {save}", err=True)
    if plot is not None:
        found.plot(plot, atlas=labels)
        typer.echo(f"wrote {plot}", err=True)
    if json_file is not None:
        written = json.dumps(found.to_dict(), allow_nan=False)
        if json_file == "-":
            print(written)
            return
        with with_filename(Path(json_file)):
            Path(json_file).write_text(written + "\n")
    terminal.show(found, Console(), labels)


def _labels(folder: Path, options: TraceOptions) -> reltrace.Atlas:
    """Read an atlas; raise InvalidArgument if the trace will have nothing that it labels."""
    if options.reduce == "token" or not any(map(has_labels, options.site or [])):
        raise invalid(
            "atlas",
            "labels neurons and heads: ask for them, with --site neuron or --site head and "
            "--reduce full, or topk and --top-k",
        )
    return reltrace.load_atlas(folder)
