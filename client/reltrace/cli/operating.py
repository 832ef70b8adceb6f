"""`reltrace quarantined` and `reltrace tenants`: what operators do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reltrace.cli.options import AsJson, Server, access_of, echo_json
from reltrace.client.admin import QuarantinedJob
from reltrace.types.errors import NotFound

quarantined = typer.Typer(no_args_is_help=True, help="Jobs that lost too many workers.")
tenants = typer.Typer(no_args_is_help=True, help="Whose jobs they are, and what each may hold.")

_SHOWN = 60
_MOST = 10_000

Limit = Annotated[
    int, typer.Option(envvar="RELTRACE_QUARANTINED_LIMIT", min=1, help="At most so many.")
]


@quarantined.command("list")
def list_quarantined(
    context: typer.Context, server: Server = None, limit: Limit = 100, as_json: AsJson = False
) -> None:
    """List them, the latest first."""
    with access_of(context).client(server) as client:
        jobs = client.admin.quarantined_jobs(limit)
    if as_json:
        echo_json([asdict(job) for job in jobs])
        return
    if not jobs:
        typer.echo("no quarantined jobs")
        return
    table = Table("job", "tenant", "model", "lost", "input")
    for job in jobs:
        table.add_row(
            job.id, job.tenant, job.model, str(len(job.lost_leases)), Text(_input(job, _SHOWN))
        )
    Console().print(table)


@quarantined.command()
def show(
    context: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its id.")],
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show one with its input, and the workers that it lost."""
    with access_of(context).client(server) as client:
        found = [one for one in client.admin.quarantined_jobs(_MOST) if one.id == job]
    if not found:
        raise NotFound(f"no quarantined job {job!r}; `reltrace quarantined list` lists them")
    if as_json:
        echo_json(asdict(found[0]))
        return
    typer.echo(f"job {found[0].id} of tenant {found[0].tenant}, model {found[0].model}")
    typer.echo(f"input: {_input(found[0])}")
    for lost in found[0].lost_leases:
        when = "" if lost.lost_at is None else f" at {lost.lost_at:%Y-%m-%d %H:%M:%S} UTC"
        typer.echo(f"attempt {lost.attempt} was lost by worker {lost.worker}{when}")


@quarantined.command()
def requeue(
    context: typer.Context,
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="JOB...", help="Their ids.", show_default=False)
    ] = None,
    server: Server = None,
    everything: Annotated[
        bool, typer.Option("--all", envvar="RELTRACE_QUARANTINED_ALL", help="All of them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Queue them once more, each as a new job of its tenant."""
    if bool(jobs) == everything:
        raise typer.BadParameter("name jobs, or say --all", param_hint="JOB...")
    with access_of(context).client(server) as client:
        ids = [job.id for job in client.admin.quarantined_jobs(_MOST)] if everything else jobs or []
        requeued = client.admin.requeue(*ids) if ids else []
    if as_json:
        echo_json([asdict(job) for job in requeued])
        return
    for job in requeued:
        typer.echo(f"{job.quarantined_id} is queued as {job.id}")
    if not requeued:
        typer.echo("no quarantined jobs")


def _input(job: QuarantinedJob, most: int | None = None) -> str:
    text = f"ids {list(job.input_ids)}" if job.prompt is None else repr(job.prompt)
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


@tenants.command("list")
def list_tenants(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """List them, with what they hold and may hold."""
    with access_of(context).client(server) as client:
        found = client.admin.tenants()
    if as_json:
        echo_json([asdict(tenant) for tenant in found])
        return
    if not found:
        typer.echo("no tenants")
        return
    table = Table("tenant", "weight", "jobs", "of", "bytes", "of")
    for tenant in found:
        table.add_row(
            tenant.name,
            "default" if tenant.weight is None else f"{tenant.weight:g}",
            f"{tenant.jobs:,}",
            "default" if tenant.max_jobs is None else f"{tenant.max_jobs:,}",
            f"{tenant.bytes:,}",
            "default" if tenant.max_bytes is None else f"{tenant.max_bytes:,}",
        )
    Console().print(table)


@tenants.command("set")
def set_tenant(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Its name.")],
    server: Server = None,
    weight: Annotated[
        float | None,
        typer.Option(envvar="RELTRACE_TENANT_WEIGHT", help="Its share against others that wait."),
    ] = None,
    max_jobs: Annotated[
        int | None,
        typer.Option(envvar="RELTRACE_SET_TENANT_MAX_JOBS", min=0, help="Bound on its jobs."),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            envvar="RELTRACE_SET_TENANT_MAX_BYTES",
            min=0,
            help="Bound on the bytes of its jobs and of results that nobody has read.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set its share and bounds; what is left out stays as it is."""
    with access_of(context).client(server) as client:
        found = client.admin.set_tenant(
            tenant, weight=weight, max_jobs=max_jobs, max_bytes=max_bytes
        )
    if as_json:
        echo_json(asdict(found))
    else:
        typer.echo(f"tenant {found.name} is set")
