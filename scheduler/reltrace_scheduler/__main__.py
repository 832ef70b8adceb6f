"""The `reltrace-scheduler` command."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from reltrace_proto.net import SettingError
from reltrace_proto.telemetry import LogFormat, Spans, configure_logs, exporting_spans, level_of

from reltrace_scheduler.api.result_store import check_url
from reltrace_scheduler.api.server import serving, until_asked_to_stop
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import DEFAULT_TENANT, Role
from reltrace_scheduler.auth.rates import Rates
from reltrace_scheduler.auth.tls import ServerTls
from reltrace_scheduler.auth.tokens import TokenError, Tokens, append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.keys import partition
from reltrace_scheduler.local.redis import EmbeddedRedis, Fsync
from reltrace_scheduler.queue.address import RedisAddress, redis_address
from reltrace_scheduler.queue.connection import connect
from reltrace_scheduler.queue.registry import Registry

TOKENS_VARIABLE = "RELTRACE_TOKENS"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# A callback, so that the scheduler itself needs no subcommand.
@app.callback(invoke_without_command=True)
def scheduler(
    context: typer.Context,
    listen: Annotated[
        str, typer.Option(envvar="RELTRACE_LISTEN", help="HOST:PORT to serve on; port 0: any.")
    ] = "127.0.0.1:50051",
    redis: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_REDIS",
            help="URL of a Redis, 6.2 or newer: redis://, rediss:// or unix://. "
            "Without it, one of the scheduler's own keeps its data under --data.",
        ),
    ] = None,
    redis_url_file: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_REDIS_URL_FILE", help="File that holds the URL, password and all."
        ),
    ] = None,
    redis_password_file: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_REDIS_PASSWORD_FILE",
            help="File that holds the password of the Redis; "
            "or put the password into RELTRACE_REDIS_PASSWORD.",
        ),
    ] = None,
    redis_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_REDIS_CA",
            help="With rediss://: PEM file of the authorities to trust. (default: the system's)",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="RELTRACE_DATA", help="Folder of the scheduler's own Redis."),
    ] = None,
    fsync: Annotated[
        Fsync,
        typer.Option(
            envvar="RELTRACE_FSYNC",
            help="When the scheduler's own Redis has its file written to the disk.",
        ),
    ] = Fsync.EVERYSEC,
    lease: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_LEASE",
            min=0.5,
            help="Seconds after which a silent worker's jobs go to another.",
        ),
    ] = Settings.lease,
    result_ttl: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_RESULT_TTL",
            min=1,
            help="Seconds that results nobody fetched are kept.",
        ),
    ] = Settings.result_ttl,
    max_lost_leases: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_MAX_LOST_LEASES",
            min=1,
            help="Lost leases after which a job is quarantined.",
        ),
    ] = Settings.max_lost_leases,
    max_jobs: Annotated[
        int, typer.Option(envvar="RELTRACE_MAX_JOBS", min=1, help="Jobs that may wait.")
    ] = Settings.max_jobs,
    max_bytes: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_MAX_BYTES",
            min=1,
            help="Bytes of jobs that wait, and of results that nobody has read.",
        ),
    ] = Settings.max_bytes,
    tenant_max_jobs: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_TENANT_MAX_JOBS",
            min=1,
            help="The same for each tenant that has no bound of its own.",
        ),
    ] = Settings.tenant_max_jobs,
    tenant_max_bytes: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_TENANT_MAX_BYTES",
            min=1,
            help="The same for each tenant that has no bound of its own.",
        ),
    ] = Settings.tenant_max_bytes,
    results_url: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_RESULTS_URL",
            help="Folder for tensors that are too large for Redis, which workers write and clients "
            "read: file:///SHARED/FOLDER, s3://BUCKET/FOLDER, ... (default: none is too large)",
            show_default=False,
        ),
    ] = "",
    results_above: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_RESULTS_ABOVE",
            min=0,
            help="Bytes of a job's tensors above which they go there.",
        ),
    ] = Settings.results_above,
    output_uri: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_OUTPUT_URI",
            help="Folder that clients may have workers write tensors to, and to those in it; may "
            "be given several times. (default: nowhere)",
            show_default=False,
        ),
    ] = None,
    shards: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_SHARDS",
            min=1,
            max=1000,
            help="Parts of the queue, each in a slot of its own of a Redis Cluster; "
            "the same for all schedulers. Each has an equal part of all bounds.",
        ),
    ] = Settings.shards,
    tokens: Annotated[
        Path | None,
        typer.Option(
            envvar=TOKENS_VARIABLE,
            help="File of the tokens that callers need, as `reltrace-scheduler token` writes it. "
            "Without it, everybody may do everything.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_LISTEN_TLS_CERT", help="PEM file of the server's certificate."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(envvar="RELTRACE_LISTEN_TLS_KEY", help="PEM file of its key."),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_LISTEN_TLS_CLIENT_CA",
            help="PEM file of the authorities whose clients may connect (mutual TLS).",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="RELTRACE_LISTEN_INSECURE",
            help="Serve other machines without TLS or without tokens.",
        ),
    ] = False,
    max_requests_per_second: Annotated[
        float | None,
        typer.Option(
            envvar="RELTRACE_MAX_REQUESTS_PER_SECOND",
            min=0.001,
            help="Calls of one token, at this scheduler. (default: no limit)",
            show_default=False,
        ),
    ] = None,
    max_jobs_per_second: Annotated[
        float | None,
        typer.Option(
            envvar="RELTRACE_MAX_JOBS_PER_SECOND",
            min=0.001,
            help="Jobs that one token submits, at this scheduler. (default: no limit)",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_METRICS",
            metavar="HOST:PORT",
            help="Where Prometheus reads metrics, over plain HTTP. (default: nowhere)",
            show_default=False,
        ),
    ] = None,
    web: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_WEB",
            metavar="HOST:PORT",
            help="Where a read-only page shows queues, workers and recent jobs to operators. "
            "(default: nowhere)",
            show_default=False,
        ),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_TRACES",
            metavar="URL",
            help="Where an OpenTelemetry collector takes spans of jobs (OTLP over gRPC), such as "
            "http://127.0.0.1:4317. (default: nowhere)",
            show_default=False,
        ),
    ] = None,
    traces_share: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_TRACES_SHARE",
            min=0,
            max=1,
            help="With --traces: of submissions that no client traces, the share that is followed.",
        ),
    ] = 0.01,
    log_level: Annotated[
        str, typer.Option(envvar="RELTRACE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="RELTRACE_LOG_FORMAT", help="For people, or one JSON object a line."),
    ] = LogFormat.CONSOLE,
) -> None:
    """Queue trace jobs in Redis and lease them to workers."""
    if context.invoked_subcommand is not None:
        return
    level = level_of(log_level)
    if level is None:
        raise typer.BadParameter(f"{log_level!r} is not debug, info, warning or error")
    configure_logs(level, log_format)
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    if tls_client_ca is not None and tls_cert is None:
        raise typer.BadParameter("--tls-client-ca needs --tls-cert and --tls-key")
    settings = Settings(
        lease=lease,
        result_ttl=result_ttl,
        max_lost_leases=max_lost_leases,
        max_jobs=max_jobs,
        max_bytes=max_bytes,
        tenant_max_jobs=tenant_max_jobs,
        tenant_max_bytes=tenant_max_bytes,
        shards=shards,
        keep_recent=web is not None,
        results_url=results_url.rstrip("/"),
        results_above=results_above,
        output_uris=tuple(uri.rstrip("/") for uri in output_uri or ()),
    )
    try:
        address = redis_address(
            redis,
            url_file=redis_url_file,
            password_file=redis_password_file,
            ca=redis_ca,
            on_command_line=_is_argument(context, "redis"),
        )
        if (address is None) == (data is None):
            raise typer.BadParameter(
                "name either a Redis by --redis or --redis-url-file, or a folder by --data"
            )
        access = Access(
            tokens=None if tokens is None else Tokens(tokens),
            tls=None
            if tls_cert is None or tls_key is None
            else ServerTls(tls_cert, tls_key, tls_client_ca),
            rates=Rates(max_requests_per_second, max_jobs_per_second),
            insecure=insecure,
        )
        # Before Redis is bothered.
        if results_url:
            check_url("--results-url", results_url)
        for uri in settings.output_uris:
            check_url("--output-uri", uri)
        access.check(listen)
        own = None if data is None else EmbeddedRedis(data, fsync)
        with exporting_spans(traces, "reltrace-scheduler", traces_share) as spans:
            uvloop.run(_run(listen, address, own, settings, access, metrics, web, spans))
    except (StartError, SettingError) as error:
        typer.echo(f"reltrace-scheduler: {error}", err=True)
        raise typer.Exit(1) from None


def _is_argument(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def token(
    name: Annotated[
        str, typer.Option(help="Tells this token from others, in the file and in the log.")
    ],
    role: Annotated[
        Role, typer.Option(help="What its holder may do; an operator may do what a client may.")
    ],
    tenant: Annotated[
        str, typer.Option(help="Whose jobs its holder submits, reads and cancels.")
    ] = DEFAULT_TENANT,
    file: Annotated[
        Path | None,
        typer.Option(
            envvar=TOKENS_VARIABLE,
            help="File to add the entry to, made if missing; without it, the entry is printed.",
        ),
    ] = None,
) -> None:
    """Make a token: it goes to standard output, once, and only its hash is kept."""
    try:
        text, entry = make(name, role, tenant)
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
    listen: str,
    address: RedisAddress | None,
    own: EmbeddedRedis | None,
    settings: Settings,
    access: Access,
    metrics: str | None,
    web: str | None,
    spans: Spans,
) -> None:
    try:
        connection = await connect(await own.start() if own else address or "")
        try:
            if own is not None:
                # Nobody else serves this store: who was connected before is not any more.
                await Registry(connection.redis, partition(settings.shards)).forget_all()
            async with serving(connection, listen, settings, access, metrics, web, spans) as bound:
                print(f"reltrace-scheduler is listening on {bound}", flush=True)
                await _until_over(own)
        finally:
            await connection.redis.aclose()
    finally:
        if own is not None:
            await own.stop()


async def _until_over(own: EmbeddedRedis | None) -> None:
    stop = asyncio.create_task(until_asked_to_stop())
    ended = asyncio.create_task(own.ended()) if own else None
    done, rest = await asyncio.wait(
        {stop, ended} if ended else {stop}, return_when=asyncio.FIRST_COMPLETED
    )
    for task in rest:
        task.cancel()
    if ended in done and ended is not None:
        # Whoever started this scheduler starts it again, and the file has every job.
        raise StartError(f"the embedded Redis ended by itself with code {ended.result()}")


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
