"""The `reltrace` command."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import reltrace
from reltrace import _terminal, _up
from reltrace._address import ADDRESS_VARIABLE, DEFAULT_ADDRESS
from reltrace._errors import TraceError, invalid
from reltrace._security import TlsOptions
from reltrace._trace import Trace, check_plot_path

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Relevance traces of LLaMA-family language models.",
)

Server = Annotated[
    str | None,
    typer.Option(
        envvar=ADDRESS_VARIABLE,
        help="HOST:PORT of the server, several with commas between, or dns:///NAME:PORT."
        f"  [default: {DEFAULT_ADDRESS}]",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", envvar="RELTRACE_JSON", help="Print JSON for machines.")
]
_ID_PREFIX = "id:"


def main() -> NoReturn:
    """Run the command; an error of ours is one line and exit code 1."""
    try:
        app()
    except (TraceError, OSError) as error:
        typer.echo(f"reltrace: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"reltrace {reltrace.__version__}")
        raise typer.Exit


@dataclass(frozen=True, slots=True)
class _Access:
    """What the options before the command say."""

    token_file: Path | None
    tls: TlsOptions | bool | None
    insecure: bool | None

    def client(self, server: str | None) -> reltrace.Client:
        # An option wins over the environment, where the client looks for what is None.
        return reltrace.Client(server, token=self.token_file, tls=self.tls, insecure=self.insecure)


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the token for the server.  [env var: RELTRACE_TOKEN_FILE, or the "
            "token itself in RELTRACE_TOKEN]",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls",
            help="Use TLS; every option below switches it on.  [env var: RELTRACE_TLS]",
            show_default=False,
        ),
    ] = None,
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
            help="The name in the server's certificate.  [default: the host of the address]",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure",
            help="Send the token in plaintext to another machine.  [env var: RELTRACE_INSECURE]",
            show_default=False,
        ),
    ] = None,
) -> None:
    options = TlsOptions(tls_ca, tls_cert, tls_key, tls_name)
    context.obj = _Access(
        token_file, options if tls is not False and options != TlsOptions() else tls, insecure
    )


@app.command()
def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to trace.")],
    server: Server = None,
    model: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_MODEL", help="Name of a served model; default: the only one."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            envvar="RELTRACE_TARGET",
            help='What is explained: "max" (the largest logit), a token\'s text, or id:N.',
        ),
    ] = "max",
    rule: Annotated[
        str, typer.Option(envvar="RELTRACE_RULE", help="Propagation rule.")
    ] = "attnlrp",
    site: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_SITE",
            help="Where relevance is read; may be repeated.  [default: resid]",
            show_default=False,
        ),
    ] = None,
    reduce: Annotated[
        str, typer.Option(envvar="RELTRACE_REDUCE", help="What is summed: token, feature, full.")
    ] = "token",
    plot: Annotated[
        Path | None,
        typer.Option(
            envvar="RELTRACE_PLOT",
            help="Write the layers-by-tokens heatmap: a .png, .svg or .pdf file, or .html for a "
            "page with hover values.",
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            envvar="RELTRACE_JSON_FILE",
            metavar="FILE|-",
            help="Write the trace as one JSON object; -: to standard output, and nothing else.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(envvar="RELTRACE_TIMEOUT", help="Seconds for the whole call."),
    ] = None,
) -> None:
    """Trace one prompt and show its tokens coloured by relevance."""
    if plot is not None:
        check_plot_path(plot)
    with _access(context).client(server) as client:
        trace = client.trace(
            prompt,
            model=model,
            sites=site or ["resid"],
            reduce=reduce,
            target=_target(target),
            rule=rule,
            timeout=timeout,
        )
    if json_file == "-":
        typer.echo(json.dumps(trace.to_dict(), allow_nan=False))
    else:
        _show(trace)
        if json_file is not None:
            Path(json_file).write_text(json.dumps(trace.to_dict(), allow_nan=False) + "\n")
    if plot is not None:
        trace.plot(plot)
        typer.echo(f"wrote {plot}", err=True)


def _access(context: typer.Context) -> _Access:
    access = context.find_object(_Access)
    assert access is not None
    return access


def _target(text: str) -> str | int:
    if not text.startswith(_ID_PREFIX):
        return text
    number = text.removeprefix(_ID_PREFIX)
    if not (number.isascii() and number.isdigit()):
        raise invalid("target", f"after {_ID_PREFIX} comes a token id, not {number!r}")
    return int(number)


def _show(trace: Trace) -> None:
    console = Console()
    if trace.provenance.reduction == "feature":
        # Nothing in it belongs to a token.
        console.print(repr(trace), markup=False, highlight=False)
    else:
        _terminal.show(trace, console)


@app.command()
def models(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """List the models that the server can trace."""
    with _access(context).client(server) as client:
        served = client.models()
    if as_json:
        typer.echo(json.dumps([asdict(model) for model in served]))
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
            f"{model.name}: sites {', '.join(model.sites)}; rules {', '.join(model.rules)}; "
            f"reductions {', '.join(model.reductions)}"
        )


@app.command()
def status(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """Show queues, workers and the store of the server."""
    with _access(context).client(server) as client:
        state = client.status()
        address = client.address
    if as_json:
        typer.echo(json.dumps(asdict(state), default=_json_time))
        return
    ended = ", ".join(f"{count:,} {name.lower()}" for name, count in sorted(state.ended.items()))
    typer.echo(
        f"reltrace {state.version} at {address}; Redis {state.redis_version}, "
        f"{state.redis_memory_bytes / 1e6:.1f} MB; ended: {ended or 'none'}"
    )
    queues = Table("model", "queued", "leased")
    for queue in state.queues:
        queues.add_row(queue.model, f"{queue.queued:,}", f"{queue.leased:,}")
    if state.queues:
        Console().print(queues)
    workers = Table("worker", "model", "device", "version", "leased", "seen")
    for worker in state.workers:
        seen = "" if worker.seen_at is None else f"{worker.seen_at:%Y-%m-%d %H:%M:%S} UTC"
        workers.add_row(
            worker.id, worker.model, worker.device, worker.version, str(worker.leased), seen
        )
    if state.workers:
        Console().print(workers)
    else:
        typer.echo("no workers")


@app.command()
def up(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RELTRACE_UP_MODEL",
            help="Folder or hub id of a LLaMA checkpoint; may be repeated.  [default: the small "
            "trained model that comes with reltrace-worker]",
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
            help="Folder of the store and the logs.  [default: reltrace in the user's data folder]",
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
) -> None:
    """Run the whole service on this machine: a store, a scheduler and workers.

    Prints one line with the address once a job would be served. Ends cleanly on Ctrl-C or SIGTERM.
    """
    source = context.get_parameter_source("redis")
    if redis is not None and source is not None and source.name == "COMMANDLINE":
        _up.check_redis_argument(redis)
    options = _up.UpOptions(
        models=tuple(dict.fromkeys(model or ["demo"])),
        port=port,
        data=(data or _up.default_data()).absolute(),
        workers=workers,
        redis=redis,
        start_timeout=start_timeout,
    )

    def report(line: str) -> None:
        print(f"reltrace up: {line}", file=sys.stderr, flush=True)

    asyncio.run(_up.up(options, announce=lambda line: print(line, flush=True), report=report))


def _json_time(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
