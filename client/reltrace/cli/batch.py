"""`reltrace batch`: a file of prompts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import typer

from reltrace.batch.folder import Settings
from reltrace.batch.items import InputFormat
from reltrace.batch.parts import PartFormat, pyarrow_modules
from reltrace.batch.preflight import check_served
from reltrace.batch.run import Options, Run, Summary
from reltrace.calls.progress import Progress
from reltrace.cli.connection import Connection
from reltrace.cli.option_groups import argument, option
from reltrace.cli.options import LIMIT, FileOptions, PromptFile, TraceOptions, file_of, target_of
from reltrace.cli.output import AS_JSON, QUIET, print_json
from reltrace.types.errors import invalid

_INTERRUPTED, _TERMINATED = 130, 143
_SECONDS_BETWEEN_LINES = 30.0


def batch(
    connection: Connection,
    trace: TraceOptions,
    reading: FileOptions,
    source: str = argument(..., "File of prompts; -: standard input.", metavar="IN"),
    out: Path = argument(..., "Folder for the traces; created if missing.", metavar="OUT_DIR"),
    output_uri: str | None = option(
        None,
        "Folder, such as s3://bucket/run-1, that workers write tensors to instead of "
        "sending them; OUT_DIR then says where they are. The server must allow it.",
        metavar="URL",
        show_default=False,
    ),
    part_format: PartFormat = option("safetensors", "Format of the files of traces.", "--format"),
    limit: int | None = LIMIT,
    shard: str | None = option(
        None,
        "Only this machine's part of the prompts: 1/4, 2/4, ... into the same OUT_DIR.",
        metavar="I/N",
    ),
    retry_failed: bool = option(
        False,
        "Also try the prompts again that failed because of the prompt itself.",
        "--retry-failed",
    ),
    max_in_flight: int = option(
        1024, "Largest number of prompts that are submitted and not finished.", min=1
    ),
    part_traces: int = option(1024, "Traces in one file.", min=1),
    part_seconds: float = option(
        10.0, "Longest time in seconds until a trace is on disk.", min=0.1
    ),
    retry_timeout: float = option(
        600.0, "Seconds to wait for a server that does not answer.", min=0
    ),
    quiet: bool = QUIET,
    as_json: bool = AS_JSON,
) -> None:
    """Trace a file of prompts. The same command again continues an interrupted run.

    Exit code: 0 if every prompt has its trace, 1 if some failed (OUT_DIR/errors.jsonl says which
    and why) or the run ended early, 130 or 143 if it was interrupted.
    """
    path = file_of(source)
    if part_format == "parquet":
        pyarrow_modules()
    input_format = reading.format_of(path)
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
    settings = Settings(
        **trace.arguments(),
        target=target_of(trace.target),
        format=part_format,
        input_format=input_format.name,
        column=reading.column,
        id_column=reading.id_column,
        shards=part[1],
        output_uri=output_uri,
    )
    # With the default timeout, so that a wrong address is reported soon.
    with connection.client() as client:
        check_served(settings, client.models())
    bar = Progress(
        None,
        shown=not quiet,
        unit="prompt",
        total=_total(path, input_format, limit, part),
        # A log gets a line now and then.
        interval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
    )
    with (
        connection.client(retry_timeout) as client,
        closing(bar),
        _reporting_signals(out),
    ):
        run = Run(client, settings, input_format, options, sys.stdin.buffer, bar)
        summary = run.run()
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
    """Return the number of prompts for this machine; None if standard input has no limit."""
    if path is None:
        return limit
    count = len(PromptFile(path, reading))
    number, machines = shard
    return len(range(number - 1, count if limit is None else min(count, limit), machines))


@contextmanager
def _reporting_signals(out: Path) -> Iterator[None]:
    """On Ctrl-C and SIGTERM say that nothing is lost, and how to continue."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        typer.echo(
            f"reltrace: interrupted; the results so far are in {out}, and the same command "
            "continues from there",
            err=True,
        )
        code = _TERMINATED if isinstance(error, SystemExit) else _INTERRUPTED
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(summary: Summary, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(summary), "out": str(out)})
        return
    failed = f", {summary.failed:,} failed (see errors.jsonl)" if summary.failed else ""
    prompts = "prompt" if summary.traced == 1 else "prompts"
    typer.echo(
        f"{out}: {summary.traced:,} {prompts} traced{failed}; {summary.new:,} in this run, "
        f"{summary.seconds:.1f} s"
    )
