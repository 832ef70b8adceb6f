"""The command `reltrace up`, which the `reltrace` command finds as an entry point."""

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict

import typer
from reltrace_proto.options import from_options, is_on_command_line

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local import service
from reltrace_scheduler.queue.address import has_password


@from_options(service.UpOptions)
def up(context: typer.Context, options: service.UpOptions) -> None:
    """Run the whole service on this machine: a store, a scheduler and workers.

    Prints one line with the address once a job would be served. Ends cleanly on Ctrl-C or SIGTERM.
    """

    def announce(ready: service.Ready) -> None:
        print(json.dumps(asdict(ready)) if options.json else ready, flush=True)

    try:
        if is_on_command_line(context, "redis") and has_password(options.redis or ""):
            raise StartError(
                "--redis: every user of this machine can read a password on the command line; put "
                "the URL into RELTRACE_REDIS, or the password into RELTRACE_REDIS_PASSWORD"
            )
        asyncio.run(service.up(options, announce=announce, report=_report))
    except StartError as error:
        typer.echo(f"reltrace: {error}", err=True)
        raise typer.Exit(1) from None


def _report(line: str) -> None:
    """Write a line to standard error, and go on if that fails.

    The reader may be gone (a closed terminal, `2>&1 | head`), or its disk full; the service still
    has to be kept running, and ended in order.
    """
    # Not `print`: what its buffer could not write would be an error once more, at exit.
    with suppress(OSError, ValueError):
        # ValueError: the stream has been closed.
        os.write(sys.stderr.fileno(), f"reltrace up: {line}\n".encode(errors="backslashreplace"))
