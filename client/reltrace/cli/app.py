"""The `reltrace` command: its parts put together."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from reltrace_proto.net import TlsOptions

import reltrace
from reltrace.cli import (
    atlas,
    batch,
    cluster,
    evaluate,
    generate,
    operating,
    tokenize,
    trace,
)
from reltrace.cli.options import Access
from reltrace.types.errors import MissingDependency, TraceError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Relevance traces of LLaMA-family language models.",
)
_TRACES, _SERVER = "Traces", "Server"
app.command(rich_help_panel=_TRACES)(trace.run)
app.command(rich_help_panel=_TRACES)(batch.batch)
app.command(rich_help_panel=_TRACES)(evaluate.evaluate)
app.command(rich_help_panel=_TRACES)(generate.generate)
app.command(rich_help_panel=_TRACES)(tokenize.tokenize)
app.command(rich_help_panel=_TRACES)(cluster.cancel)
app.command(rich_help_panel=_SERVER)(cluster.models)
app.command(rich_help_panel=_SERVER)(cluster.status)
app.add_typer(atlas.app, name="atlas", rich_help_panel=_TRACES)
app.add_typer(cluster.workers, name="workers", rich_help_panel=_SERVER)
app.add_typer(operating.quarantined, name="quarantined", rich_help_panel=_SERVER)
# The name of this command until 0.1.
app.add_typer(operating.quarantined, name="dead", hidden=True)
app.add_typer(operating.tenants, name="tenants", rich_help_panel=_SERVER)


def add_installed_commands(app: typer.Typer) -> None:
    """Add the commands of other distributions: `up` of reltrace-scheduler."""
    installed = entry_points(group="reltrace.commands")
    for entry in installed:
        app.command(entry.name, rich_help_panel=_SERVER)(entry.load())
    if "up" not in installed.names:
        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command("up", rich_help_panel=_SERVER, context_settings=anything)(_up_is_missing)


def _up_is_missing() -> None:
    """Run the whole service on this machine (needs reltrace-scheduler and reltrace-worker)."""
    raise MissingDependency(
        "`reltrace up` is part of reltrace-scheduler, which this Python does not have: "
        "pip install reltrace-scheduler reltrace-worker"
    )


def main() -> NoReturn:
    """Run the command; an error of ours is one line and exit code 1."""
    add_installed_commands(app)
    try:
        app()
    except BrokenPipeError:
        # Whoever reads has enough (`reltrace models | head -1`); nothing is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (TraceError, OSError) as error:
        typer.echo(f"reltrace: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"reltrace {reltrace.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the token for the server. (env var: RELTRACE_TOKEN_FILE, or the "
            "token itself in RELTRACE_TOKEN)",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Use TLS; every option below switches it on. (env var: RELTRACE_TLS)",
            show_default=False,
        ),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_TLS_CA",
            help="PEM file of the authorities to trust. (default: the public ones)",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="RELTRACE_TLS_CERT", help="PEM file of a certificate to show."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="RELTRACE_TLS_KEY", help="PEM file of its key.")
    ] = None,
    tls_name: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_TLS_NAME",
            help="The name in the server's certificate. (default: the host of the address)",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure",
            help="Send the token in plaintext to another machine. (env var: RELTRACE_INSECURE)",
            show_default=False,
        ),
    ] = None,
) -> None:
    options = TlsOptions(tls_ca, tls_cert, tls_key, tls_name)
    context.obj = Access(
        token_file, options if tls is not False and options != TlsOptions() else tls, insecure
    )
