"""Commands that ask a server about itself."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from reltrace._command.options import AsJson, Server, access_of, echo_json


def models(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """List the models that the server can trace."""
    with access_of(context).client(server) as client:
        served = client.models()
    if as_json:
        echo_json([asdict(model) for model in served])
        return
    if not served:
        typer.echo("no models: no worker has connected yet")
        return
    table = Table("model", "layers", "hidden", "parameters", "format", "context", "workers")
    for column in (1, 2, 3, 5, 6):
        table.columns[column].justify = "right"
    for model in served:
        table.add_row(
            model.name,
            str(model.layers),
            str(model.hidden_size),
            f"{model.parameters:,}",
            model.dtype,
            str(model.context_length),
            str(model.workers),
        )
    Console().print(table)
    for model in served:
        typer.echo(
            f"{model.name}: sites {', '.join(model.sites)}; rules {', '.join(model.rules)}; "
            f"reductions {', '.join(model.reductions)}"
        )


def status(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """Show the queues and the store of the server, and how many workers it has."""
    with access_of(context).client(server) as client:
        state = client.status()
        address = client.address
    if as_json:
        echo_json(asdict(state))
        return
    ended = ", ".join(f"{count:,} {name.lower()}" for name, count in sorted(state.ended.items()))
    typer.echo(
        f"reltrace {state.version} at {address}; Redis {state.redis_version}, "
        f"{state.redis_memory_bytes / 1e6:.1f} MB; ended: {ended or 'none'}"
    )
    queues = Table("model", "queued", "leased")
    for queue in state.queues:
        queues.add_row(queue.model, f"{queue.queued:,}", f"{queue.leased:,}")
    if state.queues:
        Console().print(queues)
    typer.echo(f"{len(state.workers)} workers" if len(state.workers) != 1 else "1 worker")


def workers(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """List the workers that are connected."""
    with access_of(context).client(server) as client:
        connected = client.status().workers
    if as_json:
        echo_json([asdict(worker) for worker in connected])
        return
    if not connected:
        typer.echo("no workers")
        return
    table = Table("worker", "model", "device", "version", "leased", "connected", "seen")
    table.columns[4].justify = "right"
    table.columns[0].overflow = "fold"
    now = datetime.now(UTC)
    for worker in connected:
        table.add_row(
            worker.id,
            worker.model,
            worker.device,
            worker.version,
            str(worker.leased),
            _since(worker.connected_at, now),
            _since(worker.seen_at, now),
        )
    Console().print(table)


def cancel(
    context: typer.Context,
    ids: Annotated[
        list[str],
        typer.Argument(metavar="JOB...", help="Ids of jobs, or of submissions for all their jobs."),
    ],
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Cancel jobs: what waits never runs, what runs is dropped before its next pass.

    Exit code 1 if there was nothing to cancel: they had ended, or there are no such jobs.
    """
    with access_of(context).client(server) as client:
        cancelled = client.cancel(*ids)
    if as_json:
        echo_json({"cancelled": cancelled})
    else:
        typer.echo(f"cancelled {cancelled} job{'' if cancelled == 1 else 's'}")
    if not cancelled:
        raise typer.Exit(1)


def _since(when: datetime | None, now: datetime) -> str:
    if when is None:
        return ""
    seconds = max(0, round((now - when).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
