"""The `reltrace` command: its parts put together."""

from __future__ import annotations

import os
import sys
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
    up,
)
from reltrace.cli.options import Access
from reltrace.types.errors import TraceError

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
app.command(rich_help_panel=_SERVER)(up.up)
app.command(rich_help_panel=_SERVER)(cluster.models)
app.command(rich_help_panel=_SERVER)(cluster.status)
app.add_typer(atlas.app, name="atlas", rich_help_panel=_TRACES)
app.add_typer(cluster.workers, name="workers", rich_help_panel=_SERVER)
app.add_typer(operating.quarantined, name="quarantined", rich_help_panel=_SERVER)
# The name of this command until 0.1.
app.add_typer(operating.quarantined, name="dead", hidden=True)
app.add_typer(operating.tenants, name="tenants", rich_help_panel=_SERVER)


def main() -> NoReturn:
    """Run the command; an error of ours is one line and exit code 1."""
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
