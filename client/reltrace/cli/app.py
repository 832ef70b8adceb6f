"""The `reltrace` command: its parts put together."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from importlib.metadata import entry_points
from typing import NoReturn

import typer

import reltrace
from reltrace.cli import admin, atlas, server
from reltrace.cli.batch import batch
from reltrace.cli.connection import Connection, config
from reltrace.cli.evaluate import evaluate
from reltrace.cli.generate import generate
from reltrace.cli.option_groups import command, option, with_option_groups
from reltrace.cli.output import LogHandler, drop_output, prepare_streams, warn
from reltrace.cli.tokenize import tokenize
from reltrace.cli.trace import trace
from reltrace.types.errors import MissingDependency, TraceError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Relevance traces of LLaMA-family language models.",
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_TRACES, _SERVER = "Traces", "Server"
command(app, rich_help_panel=_TRACES)(trace)
command(app, rich_help_panel=_TRACES)(batch)
command(app, rich_help_panel=_TRACES)(evaluate)
command(app, rich_help_panel=_TRACES)(generate)
command(app, rich_help_panel=_TRACES)(tokenize)
command(app, rich_help_panel=_TRACES)(server.cancel)
app.add_typer(atlas.app, name="atlas", rich_help_panel=_TRACES)
command(app, rich_help_panel=_SERVER)(server.models)
command(app, rich_help_panel=_SERVER)(server.status)
command(app, rich_help_panel=_SERVER)(config)
app.add_typer(server.workers, name="workers", rich_help_panel=_SERVER)
app.add_typer(admin.quarantined, name="quarantined", rich_help_panel=_SERVER)
app.add_typer(admin.tenants, name="tenants", rich_help_panel=_SERVER)
# Names of earlier versions.
command(app, "run", hidden=True)(trace)
app.add_typer(admin.quarantined, name="dead", hidden=True)


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
    """Run the command; a TraceError or OSError is one line and exit code 1."""
    prepare_streams()
    sys.argv = [_decoded(text) for text in sys.argv]
    _end_by_signals()
    add_installed_commands(app)
    log, handler = logging.getLogger("reltrace"), LogHandler(logging.WARNING)
    log.addHandler(handler)
    try:
        try:
            app()
        finally:
            # Here, and not at exit, where an error could not be told.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has ended (`reltrace models | head -1`).
        drop_output()
        sys.exit(1)
    except OSError as error:
        drop_output()
        # Files name themselves in their errors.
        unnamed = error.filename is None and error.errno in _DISK_ERRORS
        name = "standard output" if unnamed else error.filename
        warn(f"{name}: {error.strerror}" if name else str(error))
        sys.exit(1)
    except TraceError as error:
        warn(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        log.removeHandler(handler)
    sys.exit(0)


def _decoded(argument: str) -> str:
    """Return an argument that the locale's encoding could not decode, as UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in argument):
        return os.fsencode(argument).decode(errors="surrogateescape")
    return argument


def _end_by_signals() -> None:
    """End by SIGTERM and SIGHUP as by Ctrl-C, so that jobs are cancelled on the server."""
    for number in {"SIGTERM", "SIGHUP"} & set(signal.Signals.__members__):
        # Others are of a caller that has them ignored, such as nohup.
        if signal.getsignal(signal.Signals[number]) is signal.SIG_DFL:
            signal.signal(signal.Signals[number], lambda number, _: sys.exit(128 + number))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"reltrace {reltrace.__version__}")
        raise typer.Exit


@app.callback()
@with_option_groups
def _options_before(
    connection: Connection,
    version: bool = option(
        False, "Print the version.", "--version", callback=_version, is_eager=True
    ),
) -> None:
    pass
