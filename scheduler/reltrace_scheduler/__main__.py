"""The `reltrace-scheduler` command."""

import asyncio
import contextlib
import gc
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvloop
from reltrace_proto.net import SettingError
from reltrace_proto.options import from_options, is_on_command_line
from reltrace_proto.telemetry import Spans, configure_logs, exporting_spans

from reltrace_scheduler.api.result_store import check_url, shared_folders
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import DEFAULT_TENANT, Role
from reltrace_scheduler.auth.rates import Rates
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import TokenError, Tokens, append, in_time, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue.address import RedisAddress, redis_address
from reltrace_scheduler.queue.connection import connect
from reltrace_scheduler.queue.fitness import check_fitness
from reltrace_scheduler.queue.store import Store

log = structlog.get_logger()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# A callback, so that the scheduler itself needs no subcommand.
@app.callback(invoke_without_command=True)
@from_options(Settings, config_env="RELTRACE_SCHEDULER_CONFIG")
def scheduler(context: typer.Context, settings: Settings) -> None:
    """Queue trace jobs in Redis and lease them to workers."""
    if context.invoked_subcommand is not None:
        return
    settings = replace(
        settings,
        results_url=settings.results_url.rstrip("/"),
        output_uri=tuple(uri.rstrip("/") for uri in settings.output_uri),
    )
    try:
        configure_logs(settings.log_level, settings.log_format)
        address = _redis_address(context, settings)
        access = _access(settings)
        if settings.results_url:
            check_url("--results-url", settings.results_url)
        for uri in settings.output_uri:
            check_url("--output-uri", uri)
        if access.tokens is not None and (shared := shared_folders(settings.output_uri)):
            log.warning("output_uri.shared", folders=shared, by="all tenants, without {tenant}")
        access.check(settings.listen)
        if settings.metrics:
            access.check_metrics(settings.metrics)
        traces, share = settings.traces, settings.traces_share
        with exporting_spans(traces, "reltrace-scheduler", share) as spans:
            # What was imported stays: collections of garbage need not look at it.
            gc.collect()
            gc.freeze()
            uvloop.run(_run(settings, address, access, spans))
    except (StartError, SettingError) as error:
        typer.echo(f"reltrace-scheduler: {error}", err=True)
        raise typer.Exit(1) from None


def _redis_address(context: typer.Context, settings: Settings) -> RedisAddress | None:
    address = redis_address(settings, on_command_line=is_on_command_line(context, "redis"))
    if (address is None) == (settings.data is None):
        raise typer.BadParameter(
            "name either a Redis by --redis or --redis-url-file, or a folder by --data"
        )
    return address


def _access(settings: Settings) -> Access:
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if (cert is None) != (key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    if client_ca is not None and cert is None:
        raise typer.BadParameter("--tls-client-ca needs --tls-cert and --tls-key")
    return Access(
        tokens=None if settings.tokens is None else Tokens(settings.tokens),
        tls=None if cert is None or key is None else ServerTls(cert, key, client_ca),
        rates=Rates(settings.max_requests_per_second, settings.max_jobs_per_second),
        insecure=settings.insecure,
        insecure_metrics=settings.insecure_metrics,
    )


@app.command()
def token(
    name: Annotated[str, typer.Option(help="Name of this token, in the file and in the log.")],
    role: Annotated[
        Role, typer.Option(help="What its holder may do; an operator may do what a client may.")
    ],
    tenant: Annotated[
        str, typer.Option(help="Whose jobs its holder submits, reads and cancels.")
    ] = DEFAULT_TENANT,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="From when on it is refused: in so many days or hours (30d, 12h). "
            "(default: never)",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_TOKENS",
            help="File to add the entry to, made if missing; without it, the entry is printed.",
        ),
    ] = None,
) -> None:
    """Make a token: it goes to standard output, once, and only its hash is kept."""
    try:
        text, entry = make(name, role, tenant, None if expires is None else in_time(expires))
        if file is not None:
            append(file, entry)
    except TokenError as error:
        typer.echo(f"reltrace-scheduler token: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"reltrace-scheduler token: --file {file}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    typer.echo(text)
    if file is None:
        typer.echo(f"# Into the file named by --tokens:\n{entry.to_toml()}", err=True, nl=False)
    else:
        typer.echo(f"added to {file}; this is the only time that the token is shown", err=True)


async def _run(
    settings: Settings, address: RedisAddress | None, access: Access, spans: Spans
) -> None:
    embedded = None if settings.data is None else EmbeddedRedis(settings.data, settings.fsync)
    try:
        connection = await connect(await embedded.start() if embedded else address or "")
        try:
            await check_fitness(
                connection.redis,
                str(settings.data) if address is None else address.shown,
                allow_volatile=settings.allow_volatile_redis,
            )
            store = Store(connection.redis, settings)
            await store.open()
            if embedded is not None:
                # No other scheduler uses this store, so no worker is connected.
                await store.registry.forget_all()
            async with serving(connection, settings, access, spans, store) as bound:
                print(f"reltrace-scheduler is listening on {bound}", flush=True)
                await _until_over(store, embedded)
        finally:
            await connection.redis.aclose()
    finally:
        if embedded is not None:
            await embedded.stop()


async def _until_over(store: Store, embedded: EmbeddedRedis | None) -> None:
    """Wait for SIGINT or SIGTERM; raises `StartError` where Redis ends, or is not ours any more."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    superseded = asyncio.create_task(store.superseded())
    tasks: list[asyncio.Task[Any]] = [stopping, superseded]
    if embedded is not None:
        tasks.append(asyncio.create_task(embedded.ended()))
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if stopping in done:
        return
    if superseded in done:
        raise StartError(superseded.result())
    # A supervisor starts the scheduler again, and the file has every job.
    raise StartError(f"the embedded Redis ended by itself with code {tasks[-1].result()}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
