"""Commands that ask a server about itself: models, status, workers, cancel."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reltrace.cli.connection import Connection
from reltrace.cli.option_groups import argument, command, option, with_option_groups
from reltrace.cli.output import AS_JSON, Watch, print_found, print_json, safe, show, table, write
from reltrace.types.server_info import Status, Worker


def models(
    connection: Connection,
    forget: list[str] | None = option(
        None, "Make the server forget a model that no worker serves any more; jobs for it fail."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """List the models that the server can trace."""
    with connection.client() as client:
        if forget:
            client.admin.forget_models(*forget)
        served = client.models()
    rows = [
        (one.name, one.layers, one.hidden_size, f"{one.parameters:,}", one.dtype,
         one.context_length, one.workers)
        for one in served
    ]  # fmt: skip
    columns = ("model", "layers", "hidden", "parameters", "format", "context", "workers")
    right = ("layers", "hidden", "parameters", "context", "workers")
    nothing = "no models: no worker has connected yet"
    print_found(served, as_json, columns, rows, right, empty=nothing)
    for one in [] if as_json else served:
        write(
            f"{one.name}@{one.revision}: sites {', '.join(one.sites)}; "
            f"rules {', '.join(one.rules)}; reductions {', '.join(one.reductions)}"
        )


def status(connection: Connection, watch: Watch, as_json: bool = AS_JSON) -> None:
    """Show the server's queues, its Redis, and how many workers are connected."""
    last: tuple[float, int] | None = None
    with connection.client() as client:

        def fetch() -> tuple[Status, RenderableType]:
            nonlocal last
            state = client.status()
            now = (time.monotonic(), sum(state.ended.values()))
            rate = None if last is None else jobs_per_second(last, now)
            last = now
            return state, Group(*_status(state, client.address, rate))

        show(fetch, watch, as_json=as_json)


def jobs_per_second(before: tuple[float, int], now: tuple[float, int]) -> float:
    """Return the rate between two views, each the seconds of a clock and the jobs ended so far."""
    # A server that was restarted may count from zero again.
    return max(0, now[1] - before[1]) / max(now[0] - before[0], 1e-9)


def _status(state: Status, address: str, rate: float | None) -> Iterator[RenderableType]:
    ended = ", ".join(f"{count:,} {name.lower()}" for name, count in sorted(state.ended.items()))
    speed = "" if rate is None else f" ({rate:,.1f}/s)"
    yield Text(
        f"reltrace {safe(state.version)} at {address}; Redis {safe(state.redis_version)}, "
        f"{state.redis_memory_bytes / 1e6:.1f} MB; ended: {ended or 'none'}{speed}"
    )
    if state.queues:
        serving = Counter(
            name for worker in state.workers for name in (worker.model, *worker.further_models)
        )
        rows = [
            (one.model, f"{one.queued:,}", f"{one.leased:,}", serving[one.model.partition("@")[0]])
            for one in state.queues
        ]
        columns = ("model", "queued", "leased", "workers")
        yield table(columns, rows, columns[1:])
    if state.tenants:
        unread = [(one.name, f"{one.unread_bytes:,}", f"{one.jobs:,}") for one in state.tenants]
        held = ("tenant", "bytes of unread results", "jobs")
        yield table(held, unread, held[1:])
    yield Text(_counted(len(state.workers), "worker"))


workers = typer.Typer()


@workers.callback(invoke_without_command=True)
@with_option_groups
def list_workers(
    context: typer.Context, connection: Connection, watch: Watch, as_json: bool = AS_JSON
) -> None:
    """List the connected workers; `drain` stops some of them."""
    if context.invoked_subcommand is not None:
        return
    with connection.client() as client:

        def fetch() -> tuple[Sequence[Worker], RenderableType]:
            connected = client.admin.workers()
            return connected, _workers(connected) if connected else Text("no workers")

        show(fetch, watch, as_json=as_json)


def _workers(connected: Sequence[Worker]) -> Table:
    now = datetime.now(UTC)
    rows = [
        (_condition(one), "\n".join((one.model, *one.further_models)),
         one.device, one.version, one.leased, _ago(one.connected_at, now), _ago(one.seen_at, now))
        for one in connected
    ]  # fmt: skip
    columns = ("worker", "models", "device", "version", "leased", "connected", "seen")
    return table(columns, rows, ("leased",))


def _condition(worker: Worker) -> str:
    notes = ["draining"] * worker.draining
    if worker.silent:
        notes.append(f"stalled {worker.silent:.0f} s")
    return f"{worker.id} ({', '.join(notes)})" if notes else worker.id


@command(workers)
def drain(
    connection: Connection,
    ids: list[str] = argument(..., "Ids of workers.", metavar="WORKER..."),
) -> None:
    """Drain workers: they return the jobs that have not begun, finish the others, and exit."""
    with connection.client() as client:
        client.admin.drain(*ids)
    typer.echo(f"{_counted(len(ids), 'worker')} told to drain")


def cancel(
    connection: Connection,
    ids: list[str] = argument(
        ..., "Ids of jobs, or of submissions for all their jobs.", metavar="JOB..."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Cancel jobs: queued ones never run, running ones are dropped before their next pass.

    Exit code 1 if there was nothing to cancel: they had ended, or there are no such jobs.
    """
    with connection.client() as client:
        cancelled = client.cancel(*ids)
    if as_json:
        print_json({"cancelled": cancelled})
    else:
        typer.echo(f"cancelled {_counted(cancelled, 'job')}")
    if not cancelled:
        raise typer.Exit(1)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _ago(when: datetime | None, now: datetime) -> str:
    if when is None:
        return ""
    seconds = max(0, round((now - when).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
