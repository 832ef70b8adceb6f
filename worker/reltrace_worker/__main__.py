"""The `reltrace-worker` command."""

import gc
import os
import secrets
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import structlog
import typer
import uvloop
from reltrace_proto.net import Credentials, SettingError, TlsOptions, token_from_environment
from reltrace_proto.options import from_options
from reltrace_proto.telemetry import Spans, configure_logs, exporting_spans
from reltrace_proto.v1 import worker_pb2

from reltrace_worker import __version__
from reltrace_worker.config import Settings
from reltrace_worker.session.endpoint import Endpoints
from reltrace_worker.types.errors import WorkerError

if TYPE_CHECKING:
    from reltrace_worker.session.serving import Served

log = structlog.get_logger()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_OPTIONS = {
    "address": "--scheduler",
    "token": "--token-file or RELTRACE_TOKEN",
    "tls.ca": "--tls-ca",
    "tls.cert": "--tls-cert",
    "tls.key": "--tls-key",
}
"""The options behind the settings that `reltrace_proto.net` names."""


@app.command()
@from_options(Settings, config_env="RELTRACE_WORKER_CONFIG")
def worker(_: typer.Context, settings: Settings) -> None:
    """Keep a model loaded and trace the jobs that the scheduler leases out."""
    most, memory = settings.max_tokens, settings.memory_gib
    if most != "auto" and not (most.isdecimal() and int(most) > 0):
        raise typer.BadParameter(f"max-tokens {most!r} is neither auto nor a number above 0")
    if memory is not None and not memory > 0:
        raise typer.BadParameter(f"memory-gib must be above 0, not {memory}")
    code = 1
    try:
        _serve(settings)
        code = 0
    except SettingError as error:
        option = _OPTIONS.get(error.field, error.field)
        typer.echo(f"reltrace-worker: {option}: {error.reason}", err=True)
    except WorkerError as error:
        typer.echo(f"reltrace-worker: {error}", err=True)
    # A pass that outlasted its grace was handed back; its thread must not hold us here.
    sys.stderr.flush()
    os._exit(code)


def _serve(settings: Settings) -> None:
    worker_id = f"{settings.worker_id or socket.gethostname()}-{secrets.token_hex(4)}"
    configure_logs(settings.log_level, settings.log_format, worker=worker_id)
    # Wrong settings are found before a model is loaded for minutes.
    credentials = _credentials(settings)
    Endpoints(settings.scheduler, credentials)
    # Only now: torch and transformers take seconds to import, and --help should not. What they
    # make stays: looking for garbage among it takes a second here, and again now and then.
    gc.disable()
    # Threads that spin while they wait for each other lose whole time slices where something else
    # computes: a pass took ten times as long on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from reltrace_worker.observability.metrics import WorkerCollector, exporting
    from reltrace_worker.session.followers import RANK, Followers, join
    from reltrace_worker.session.model_sources import read_sources
    from reltrace_worker.session.serving import follow, serve

    gc.freeze()
    gc.enable()
    size = settings.tensor_parallel
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    elif size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    sources = read_sources(settings.model, settings.name, settings.revision)
    if RANK in os.environ:
        rank, folder = os.environ[RANK].split(" ", 1)
        follow(sources, settings, int(rank), Path(folder))
    with ExitStack() as stack:
        followers, ranks = None, None
        if size > 1:
            meeting = Path(stack.enter_context(TemporaryDirectory(prefix="reltrace-ranks-")))
            command = [sys.executable, "-m", "reltrace_worker", *sys.argv[1:]]
            followers = Followers(size, meeting, command)
            ranks = join(0, size, meeting, settings.device)
        spans = stack.enter_context(exporting_spans(settings.traces, "reltrace-worker"))
        served = serve(sources, settings, spans, followers, ranks)
        if settings.metrics is not None:
            watchdog = served.watchdog
            collector = WorkerCollector(served.stats, served.memory, watchdog.silent)
            stack.enter_context(exporting(settings.metrics, collector, watchdog.fault))
        uvloop.run(_run(settings, credentials, served, worker_id, spans))


def _credentials(settings: Settings) -> Credentials:
    tls = TlsOptions(settings.tls_ca, settings.tls_cert, settings.tls_key, settings.tls_name)
    return Credentials(
        settings.token_file or token_from_environment(),
        tls if settings.tls or tls != TlsOptions() else None,
        insecure=settings.insecure,
        failed=lambda error: log.error("credentials.unreadable", error=str(error)),
    )


async def _run(
    settings: Settings, credentials: Credentials, served: "Served", worker_id: str, spans: Spans
) -> None:
    """Work until something ends this worker; see `work`."""
    from reltrace_worker.session.lifecycle import work
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
        settings.scheduler,
        hello,
        served.runner,
        credentials=credentials,
        spans=spans,
        drafts=served.drafts,
        watchdog=served.watchdog,
    )
    await work(session, served.watchdog, settings.drain_grace)


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
