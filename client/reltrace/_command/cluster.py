"""Commands that ask a server about itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from reltrace._command.options import AsJson, Server, access_of


def models(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """List the models that the server can trace."""
    with access_of(context).client(server) as client:
        served = client.models()
    if as_json:
        typer.echo(json.dumps([asdict(model) for model in served]))
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
    """Show queues, workers and the store of the server."""
    with access_of(context).client(server) as client:
        state = client.status()
        address = client.address
    if as_json:
        typer.echo(json.dumps(asdict(state), default=_json_time))
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
    workers = Table("worker", "model", "device", "version", "leased", "seen")
    for worker in state.workers:
        seen = "" if worker.seen_at is None else f"{worker.seen_at:%Y-%m-%d %H:%M:%S} UTC"
        workers.add_row(
            worker.id, worker.model, worker.device, worker.version, str(worker.leased), seen
        )
    if state.workers:
        Console().print(workers)
    else:
        typer.echo("no workers")


def _json_time(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
