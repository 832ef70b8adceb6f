"""Log lines and spans."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from reltrace_proto.net import SettingError
from reltrace_proto.telemetry import (
    LogFormat,
    Spans,
    configure_logs,
    exporting_spans,
)
from reltrace_proto.v1 import types_pb2

Lines = Callable[[], list[dict[str, Any]]]

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331"

log = structlog.get_logger()


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What was logged as JSON so far."""
    written = io.StringIO()
    with redirect_stderr(written):
        configure_logs("info", LogFormat.JSON, worker="gpu-1-00ff")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    structlog.reset_defaults()


def test_every_line_is_an_object_with_the_fields(lines: Lines) -> None:
    log.info("one", job="j-1")
    log.debug("not shown")
    # Passes run on threads of their own.
    thread = threading.Thread(target=lambda: log.warning("two\nlines"))
    thread.start()
    thread.join()
    first, second = lines()
    assert (first["event"], first["job"], first["level"]) == ("one", "j-1", "info")
    assert (second["event"], second["worker"]) == ("two\nlines", "gpu-1-00ff")
    assert first["worker"] == "gpu-1-00ff"
    assert first["timestamp"].endswith("Z")


@pytest.mark.parametrize("form", LogFormat)
@pytest.mark.parametrize(("level", "shown"), [("info", False), ("debug", True)])
def test_a_traceback_has_no_variables_and_messages_only_if_asked_for(
    form: LogFormat, level: str, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Given an error with another before it, whose messages and variables hold a text
    I expect its kind and where it was raised, on one line of JSON, and messages at level debug.
    """
    configure_logs(level, form)
    text = "an" + "kara"
    try:
        try:
            raise KeyError(text)
        except KeyError as error:
            raise ValueError(f"no {text}") from error
    except ValueError:
        log.exception("failed")
    structlog.reset_defaults()
    said = capsys.readouterr().err
    if form is LogFormat.JSON:
        said = json.loads(said)["exception"]
    assert said.index("KeyError") < said.index("followed by") < said.index("ValueError")
    assert "test_telemetry.py" in said
    assert ("no ankara" in said) == shown
    assert said.count("ankara") == (2 if shown else 0)


def test_errors_that_cause_each_other_end(lines: Lines) -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    log.error("failed", exc_info=first)
    (line,) = lines()
    assert line["exception"] == "KeyError\nfollowed by:\nValueError"


def test_lines_for_people_have_the_fields_too() -> None:
    written = io.StringIO()
    with redirect_stderr(written):
        configure_logs("info", LogFormat.CONSOLE, worker="gpu-1-00ff")
        log.info("one", job="j-1")
    structlog.reset_defaults()
    assert "worker=gpu-1-00ff" in written.getvalue()
    assert "job=j-1" in written.getvalue()


def test_lines_for_people_control_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", LogFormat.CONSOLE)
    log.info("call.refused", method="/x\x1b[2J\r\u202e", reason="\x1b]0;x\x07")
    structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "method=/x\\x1b[2J\\r\\u202e" in said
    assert said.rstrip("\n").isprintable()


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("WARNING", LogFormat.JSON)
    log.info("not shown")
    log.warning("shown")
    structlog.reset_defaults()
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["shown"]
    with pytest.raises(SettingError, match="--log-level loud: must be debug, info"):
        configure_logs("loud", LogFormat.JSON)


def test_a_span_ends_now_in_the_trace_of_its_parent_if_that_is_sampled() -> None:
    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    spans = Spans(provider.get_tracer("test"))
    for parent in (f"{PARENT}-01", f"{PARENT}-00", "", "nonsense"):
        spans.record("reltrace.pass", parent, 2.0, tokens=7)
    (span,) = exported.get_finished_spans()
    assert span.name == "reltrace.pass"
    assert span.attributes == {"reltrace.tokens": 7}
    assert f"{span.context.trace_id:032x}" == TRACE
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(2.0)
    Spans().record("reltrace.pass", f"{PARENT}-01", 2.0)


def test_a_share_of_the_submissions_gets_a_trace() -> None:
    """
    Given submissions, some of whose jobs have a trace
    I expect about the share to get one, the same when sent again, and no other to be changed.
    """

    def traced(share: float, key: str) -> list[str]:
        jobs = [types_pb2.JobSpec(), types_pb2.JobSpec(traceparent=PARENT)]
        Spans(share=share).start_traces(key, jobs)
        assert jobs[1].traceparent == PARENT
        return [jobs[0].traceparent]

    keys = [str(number) for number in range(400)]
    assert 60 < sum(traced(0.25, key) != [""] for key in keys) < 140
    assert traced(1.0, "k") == traced(1.0, "k") != [""]
    assert traced(1.0, "") == traced(0.0, "k") == [""]


def test_an_endpoint_that_is_no_url() -> None:
    with (
        pytest.raises(SettingError, match="--traces host:4317: must be a URL"),
        exporting_spans("host:4317", "reltrace-worker"),
    ):
        pass
    with exporting_spans(None, "reltrace-worker") as spans:
        spans.record("reltrace.pass", f"{PARENT}-01", 2.0)
