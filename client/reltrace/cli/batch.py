"""`reltrace batch`: a file of prompts."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reltrace.batch.folder import Settings
from reltrace.batch.items import InputFormat, count_items
from reltrace.batch.parts import PartFormat, pyarrow_modules
from reltrace.batch.preflight import check_served
from reltrace.batch.run import Options, Run, Summary
from reltrace.calls.progress import Progress
from reltrace.cli.options import (
    AsJson,
    Column,
    Dtype,
    IdColumn,
    Layers,
    Limit,
    Model,
    PromptFormat,
    Quiet,
    Reduce,
    Rule,
    Server,
    Sites,
    SpecialTokens,
    TargetText,
    TopK,
    access_of,
    target_of,
)
from reltrace.types.errors import invalid

_INTERRUPTED, _TERMINATED = 130, 143
# A log is no terminal: a line now and then is enough.
_SECONDS_BETWEEN_LINES = 30.0


def batch(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="IN", help="File of prompts; -: standard input.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="Folder of the traces; made if need be.")
    ],
    server: Server = None,
    model: Model = None,
    target: TargetText = "max",
    rule: Rule = "attnlrp",
    site: Sites = None,
    reduce: Reduce = "token",
    top_k: TopK = None,
    layer: Layers = None,
    dtype: Dtype = "float32",
    add_special_tokens: SpecialTokens = True,
    output_uri: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_BATCH_OUTPUT_URI",
            metavar="URL",
            help="Folder, such as s3://bucket/run-1, that workers write tensors to instead of "
            "sending them; OUT_DIR then says where they are. One that the server allows.",
            show_default=False,
        ),
    ] = None,
    part_format: Annotated[
        PartFormat, typer.Option("--format", envvar="RELTRACE_FORMAT", help="Of the traces.")
    ] = "safetensors",
    input_format: PromptFormat = None,
    column: Column = None,
    id_column: IdColumn = None,
    limit: Limit = None,
    shard: Annotated[
        str | None,
        typer.Option(
            envvar="RELTRACE_SHARD",
            metavar="I/N",
            help="Only this machine's part of the prompts: 1/4, 2/4, ... into the same OUT_DIR.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            envvar="RELTRACE_RETRY_FAILED",
            help="Try prompts again that the server found fault with.",
        ),
    ] = False,
    max_in_flight: Annotated[
        int,
        typer.Option(
            envvar="RELTRACE_MAX_IN_FLIGHT", min=1, help="Prompts on their way at a time."
        ),
    ] = 1024,
    part_traces: Annotated[
        int, typer.Option(envvar="RELTRACE_PART_TRACES", min=1, help="Traces in one file.")
    ] = 1024,
    part_seconds: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_PART_SECONDS", min=0.1, help="Most seconds until a trace is on disk."
        ),
    ] = 10.0,
    retry_timeout: Annotated[
        float,
        typer.Option(
            envvar="RELTRACE_RETRY_TIMEOUT",
            min=0,
            help="Seconds to wait for a server that is away.",
        ),
    ] = 600.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Trace a file of prompts. The same command again goes on where it was left.

    Exit code: 0 if every prompt has its trace, 1 if some failed (OUT_DIR/errors.jsonl says which
    and why) or the run broke off, 130 or 143 if it was interrupted.
    """
    path = None if source == "-" else Path(source)
    if path is not None and not path.is_file():
        raise invalid("input", f"there is no file {source!r}")
    if part_format == "parquet":
        pyarrow_modules()
    reading = InputFormat.of(
        path, input_format or ("jsonl" if path is None else None), column, id_column
    )
    part = _shard(shard)
    options = Options(
        path,
        out,
        limit=limit,
        shard=part,
        retry_failed=retry_failed,
        max_in_flight=max_in_flight,
        part_traces=part_traces,
        part_seconds=part_seconds,
    )
    wanted = target_of(target)
    settings = Settings(
        model=model,
        sites=site or ["resid"],
        reduce=reduce,
        target=wanted,
        rule=rule,
        dtype=dtype,
        layers=layer or None,
        top_k=top_k,
        format=part_format,
        input_format=reading.name,
        column=column,
        id_column=id_column,
        shards=part[1],
        output_uri=output_uri,
        add_special_tokens=add_special_tokens,
    )
    # With the usual patience: a wrong address is told at once, and only then waited for.
    with access_of(context).client(server) as client:
        check_served(settings, client.models())
    with (
        access_of(context).client(server, retry_timeout) as client,
        closing(_bar(_total(path, reading, limit, part), quiet)) as bar,
        _stopped_in_order(out),
        _said_aloud(),
    ):
        summary = Run(client, settings, reading, options, sys.stdin.buffer, bar).run(wanted)
    _report(summary, out, as_json)
    if summary.failed:
        raise typer.Exit(1)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise invalid("shard", f"must be I/N with I from 1 to N, such as 2/8, not {text!r}")


def _total(
    path: Path | None, reading: InputFormat, limit: int | None, shard: tuple[int, int]
) -> int | None:
    """Return how many prompts there are for this machine; None where only reading them tells."""
    if path is None:
        return limit
    with path.open("rb") as file:
        count = count_items(file, reading)
    count = count if limit is None else min(count, limit)
    number, machines = shard
    return max(0, count - number + machines) // machines


class _Stop(BaseException):
    """SIGTERM."""


@contextmanager
def _stopped_in_order(out: Path) -> Iterator[None]:
    """On Ctrl-C and SIGTERM say that nothing is lost, and how it goes on."""

    def stop(*_: object) -> None:
        raise _Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, _Stop) as error:
        typer.echo(
            f"reltrace: interrupted; what has come is in {out}, and the same command goes on "
            "from there",
            err=True,
        )
        code = _TERMINATED if isinstance(error, _Stop) else _INTERRUPTED
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Aloud(logging.Handler):
    """Says what the client logs beside the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"reltrace: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _said_aloud() -> Iterator[None]:
    """Tell that the server is away: otherwise a run that waits for it looks stuck."""
    handler = _Aloud(logging.WARNING)
    logging.getLogger("reltrace").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("reltrace").removeHandler(handler)


def _bar(total: int | None, quiet: bool) -> Progress:
    """Return a bar on standard error; in a log, a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    return Progress(None, shown=not quiet, unit="prompt", total=total, interval=interval)


def _report(summary: Summary, out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(summary), "out": str(out)}))
        return
    failed = f", {summary.failed:,} failed (see errors.jsonl)" if summary.failed else ""
    typer.echo(
        f"{out}: {summary.traced:,} prompts traced{failed}; {summary.new:,} in this run, "
        f"{summary.seconds:.1f} s"
    )
