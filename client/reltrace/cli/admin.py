"""`reltrace quarantined` and `reltrace tenants`: commands for operators."""

from __future__ import annotations

import typer

from reltrace.cli.connection import Connection, connection_group
from reltrace.cli.option_groups import argument, command, option
from reltrace.cli.output import AS_JSON, print_found, print_json, write
from reltrace.types.errors import NotFound
from reltrace.types.server_info import QuarantinedJob

quarantined = connection_group("Jobs in quarantine: too many workers were lost while running them.")
tenants = connection_group("Tenants: their usage and limits.")

_INPUT_CHARACTERS = 60
_MAX_JOBS = 10_000


@command(quarantined, "list")
def list_quarantined(
    connection: Connection,
    limit: int = option(100, "Show at most N jobs.", min=1),
    as_json: bool = AS_JSON,
) -> None:
    """List quarantined jobs, the latest first."""
    with connection.client() as client:
        jobs = client.admin.quarantined_jobs(limit)
    rows = [
        (job.id, job.tenant, job.model, len(job.lost_leases), _input(job, _INPUT_CHARACTERS))
        for job in jobs
    ]
    columns = ("job", "tenant", "model", "lost", "input")
    print_found(jobs, as_json, columns, rows, ("lost",), empty="no quarantined jobs")


@command(quarantined)
def show(
    connection: Connection,
    job: str = argument(..., "Id of the job.", metavar="JOB"),
    as_json: bool = AS_JSON,
) -> None:
    """Show a quarantined job: its input and the workers that were lost."""
    with connection.client() as client:
        found = next(
            (one for one in client.admin.quarantined_jobs(_MAX_JOBS) if one.id == job), None
        )
    if found is None:
        raise NotFound(f"no quarantined job {job!r}; `reltrace quarantined list` lists them")
    if as_json:
        print_json(found)
        return
    write(f"job {found.id} of tenant {found.tenant}, model {found.model}")
    write(f"input: {_input(found)}")
    for lost in found.lost_leases:
        when = "" if lost.lost_at is None else f" at {lost.lost_at:%Y-%m-%d %H:%M:%S} UTC"
        write(f"attempt {lost.attempt} was lost by worker {lost.worker}{when}")


@command(quarantined)
def requeue(
    connection: Connection,
    jobs: list[str] | None = argument(None, "Ids of jobs.", metavar="JOB...", show_default=False),
    everything: bool = option(False, "Requeue all of them.", "--all"),
    as_json: bool = AS_JSON,
) -> None:
    """Queue quarantined jobs again, each as a new job of its tenant."""
    if bool(jobs) == everything:
        raise typer.BadParameter("give ids of jobs, or --all", param_hint="JOB...")
    with connection.client() as client:
        ids = jobs or [job.id for job in client.admin.quarantined_jobs(_MAX_JOBS)]
        requeued = client.admin.requeue(*ids) if ids else []
    if as_json:
        print_json(requeued)
        return
    for job in requeued:
        typer.echo(f"{job.quarantined_id} is queued as {job.id}")
    if not requeued:
        typer.echo("no quarantined jobs")


def _input(job: QuarantinedJob, most: int | None = None) -> str:
    text = f"ids {list(job.input_ids)}" if job.prompt is None else repr(job.prompt)
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


@command(tenants, "list")
def list_tenants(connection: Connection, as_json: bool = AS_JSON) -> None:
    """List tenants with their usage and limits."""
    with connection.client() as client:
        found = client.admin.tenants()
    rows = [
        (one.name, _limit(one.weight, "g"), f"{one.jobs:,}", _limit(one.max_jobs, ","),
         f"{one.bytes:,}", _limit(one.max_bytes, ","))
        for one in found
    ]  # fmt: skip
    columns = ("tenant", "weight", "jobs", "of", "bytes", "of")
    right = ("weight", "jobs", "of", "bytes")
    print_found(found, as_json, columns, rows, right, empty="no tenants")


def _limit(value: float | None, style: str) -> str:
    return "default" if value is None else format(value, style)


@command(tenants, "set")
def set_tenant(
    connection: Connection,
    tenant: str = argument(..., "Name of the tenant.", metavar="TENANT"),
    weight: float | None = option(None, "Its share, relative to other tenants with queued jobs."),
    max_jobs: int | None = option(None, "Largest number of its jobs.", min=0),
    max_bytes: int | None = option(
        None, "Largest size of its jobs and unread results together, in bytes.", min=0
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Set the weight and limits of a tenant; those that are not given stay unchanged."""
    with connection.client() as client:
        found = client.admin.set_tenant(
            tenant, weight=weight, max_jobs=max_jobs, max_bytes=max_bytes
        )
    if as_json:
        print_json(found)
    else:
        typer.echo(f"tenant {found.name} is set")
