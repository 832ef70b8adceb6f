"""Commands that ask a server about itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from reltrace.cli.options import AsJson, Server, access_of, echo_json
from reltrace.cli.watch import Every, View, Watch, show
from reltrace.types.server_info import Status, Worker


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
            f"{model.name}@{model.revision}: sites {', '.join(model.sites)}; "
            f"rules {', '.join(model.rules)}; reductions {', '.join(model.reductions)}"
        )


def status(
    context: typer.Context,
    server: Server = None,
    watch: Watch = False,
    every: Every = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the queues and the store of the server, and how many workers it has."""
    before: _Look | None = None

    with access_of(context).client(server) as client:

        def look() -> View:
            nonlocal before
            state = client.status()
            now = _Look(time.monotonic(), sum(state.ended.values()))
            rate = None if before is None else now.rate_since(before)
            before = now
            return View(Group(*_status(state, client.address, rate)), asdict(state))

        show(look, watch=watch, every=every, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Look:
    """How many jobs had ended when."""

    at: float
    ended: int

    def rate_since(self, before: _Look) -> float:
        return max(0, self.ended - before.ended) / max(self.at - before.at, 1e-9)


def _status(state: Status, address: str, rate: float | None) -> Iterator[RenderableType]:
    """Draw a status.

    Parameters
    ----------
    rate : float or None
        Jobs that ended per second since the look before; None: this is the first.
    """
    ended = ", ".join(f"{count:,} {name.lower()}" for name, count in sorted(state.ended.items()))
    speed = "" if rate is None else f" ({rate:,.1f}/s)"
    yield Text(
        f"reltrace {state.version} at {address}; Redis {state.redis_version}, "
        f"{state.redis_memory_bytes / 1e6:.1f} MB; ended: {ended or 'none'}{speed}"
    )
    if state.queues:
        serving = Counter(
            name for worker in state.workers for name in (worker.model, *worker.further_models)
        )
        table = Table("model", "queued", "leased", "workers")
        for column in (1, 2, 3):
            table.columns[column].justify = "right"
        for queue in state.queues:
            table.add_row(
                Text(queue.model),
                f"{queue.queued:,}",
                f"{queue.leased:,}",
                str(serving[queue.model.partition("@")[0]]),
            )
        yield table
    yield Text(f"{len(state.workers)} workers" if len(state.workers) != 1 else "1 worker")


workers = typer.Typer(help="The workers that are connected; `drain` has some of them leave.")


@workers.callback(invoke_without_command=True)
def list_workers(
    context: typer.Context,
    server: Server = None,
    watch: Watch = False,
    every: Every = 1.0,
    as_json: AsJson = False,
) -> None:
    """List the workers that are connected; `drain` has some of them leave."""
    if context.invoked_subcommand is not None:
        return
    with access_of(context).client(server) as client:

        def look() -> View:
            connected = client.admin.workers()
            drawn = _workers(connected) if connected else Text("no workers")
            return View(drawn, [asdict(worker) for worker in connected])

        show(look, watch=watch, every=every, as_json=as_json)


def _workers(connected: Sequence[Worker]) -> Table:
    table = Table("worker", "models", "device", "version", "leased", "connected", "seen")
    table.columns[4].justify = "right"
    table.columns[0].overflow = "fold"
    now = datetime.now(UTC)
    for worker in connected:
        table.add_row(
            Text(f"{worker.id} (drains)" if worker.draining else worker.id),
            Text("\n".join((worker.model, *worker.further_models))),
            worker.device,
            worker.version,
            str(worker.leased),
            _since(worker.connected_at, now),
            _since(worker.seen_at, now),
        )
    return table


@workers.command()
def drain(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="WORKER...", help="Their ids.")],
    server: Server = None,
) -> None:
    """Have workers leave: they hand back what waits, end what runs, and end."""
    with access_of(context).client(server) as client:
        client.admin.drain(*ids)
    typer.echo(f"{len(ids)} worker{'' if len(ids) == 1 else 's'} told to leave")


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
