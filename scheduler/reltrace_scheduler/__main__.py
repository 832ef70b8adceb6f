"""The `reltrace-scheduler` command."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

from reltrace_scheduler.config import Settings
from reltrace_scheduler.embedded import EmbeddedRedis
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.server import serving, until_asked_to_stop
from reltrace_scheduler.store.connection import connect
from reltrace_scheduler.store.keys import Keys
from reltrace_scheduler.store.registry import Registry

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def scheduler(
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
    data: Annotated[
        Path | None,
        typer.Option(envvar="RELTRACE_DATA", help="Folder of the scheduler's own Redis."),
    ] = None,
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
    max_jobs: Annotated[
        int, typer.Option(envvar="RELTRACE_MAX_JOBS", min=1, help="Jobs that may wait.")
    ] = Settings.max_jobs,
    log_level: Annotated[
        str, typer.Option(envvar="RELTRACE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Queue trace jobs in Redis and lease them to workers."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(f"{log_level!r} is not debug, info, warning or error")
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if (redis is None) == (data is None):
        raise typer.BadParameter("name either a Redis by --redis, or a folder by --data")
    settings = Settings(lease=lease, result_ttl=result_ttl, max_jobs=max_jobs)
    try:
        asyncio.run(_run(listen, redis, data, settings))
    except StartError as error:
        typer.echo(f"reltrace-scheduler: {error}", err=True)
        raise typer.Exit(1) from None


async def _run(listen: str, url: str | None, data: Path | None, settings: Settings) -> None:
    own = EmbeddedRedis(data) if data is not None else None
    try:
        connection = await connect(await own.start() if own else url or "")
        try:
            if own is not None:
                # Nobody else serves this store: who was connected before is not any more.
                await Registry(connection.redis, Keys()).forget_all()
            async with serving(connection, listen, settings) as address:
                print(f"reltrace-scheduler is listening on {address}", flush=True)
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
