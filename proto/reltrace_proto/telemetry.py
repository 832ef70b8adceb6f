"""Log lines by structlog, metrics for Prometheus, and spans of jobs for OpenTelemetry.

A job carries the span of the client's that it belongs to, as ``traceparent`` of the W3C's Trace
Context. Scheduler and worker add what they did for it once it is over, with the times at which it
was done, so that no span is kept open. The packages are optional: see the extras of this
distribution.
"""

import hashlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import structlog

from reltrace_proto.net import SettingError, host_and_port

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from opentelemetry.trace import Tracer
    from prometheus_client import CollectorRegistry
    from structlog.types import EventDict, ExcInfo, Processor

    from reltrace_proto.v1 import types_pb2


_MAX_FRAMES = 50
"""Of a traceback, the last ones: an error in a recursion has a thousand."""
_SILENCE = 10.0
"""Seconds after which a connection to the metrics is closed on which nothing is sent."""


class LogFormat(StrEnum):
    """For people, or one JSON object a line."""

    CONSOLE = "console"
    JSON = "json"


def configure_logs(level: str, form: LogFormat, **fields: str) -> None:
    """Set up structlog for the whole process; `fields` are added to every line of every thread.

    Tracebacks have neither variables nor the messages of errors, either of which may be a prompt;
    the level debug adds the messages.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise SettingError(f"--log-level {level}", "must be debug, info, warning or error")

    def add_fields(logger: object, method: str, event: "EventDict") -> "EventDict":
        return {**fields, **event}

    def format_traceback(exc_info: "ExcInfo") -> str:
        return _traceback(exc_info[1], messages=number <= logging.DEBUG)

    renderer: list[Processor] = (
        [structlog.processors.JSONRenderer()]
        if form is LogFormat.JSON
        else [
            _without_control_characters,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    )
    structlog.configure(
        processors=[
            add_fields,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.ExceptionRenderer(format_traceback),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _without_control_characters(logger: object, method: str, event: "EventDict") -> "EventDict":
    """Escape what could control a terminal: names and reasons may be a stranger's."""
    return {key: _plain(value) if isinstance(value, str) else value for key, value in event.items()}


def _plain(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _traceback(error: BaseException, *, messages: bool) -> str:
    """Return where an error and those before it were raised, and their kinds."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.insert(0, cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\nfollowed by:\n".join(_raised(each, messages) for each in chain)


def _raised(error: BaseException, messages: bool) -> str:
    frames = traceback.extract_tb(error.__traceback__, limit=-_MAX_FRAMES)
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return "".join(traceback.format_list(frames)) + (f"{kind}: {error}" if messages else kind)


@contextmanager
def serving_metrics(
    listen: str, registry: "CollectorRegistry", fault: Callable[[], str] = str
) -> Iterator[str]:
    """Serve metrics over HTTP on ``HOST:PORT`` until the block ends; gives the bound address.

    ``/healthz`` answers 503 with what `fault` returns, unless that is empty.
    """
    from prometheus_client import start_http_server

    host, port = host_and_port("--metrics", listen)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise SettingError(f"--metrics {listen}", error.strerror or str(error)) from error
    server.RequestHandlerClass = _impatient(server.RequestHandlerClass)
    metrics = server.get_app()
    assert metrics is not None

    def answer(environ: "WSGIEnvironment", start: "StartResponse") -> "Iterable[bytes]":
        if environ["PATH_INFO"] != "/healthz":
            return metrics(environ, start)
        found = fault()
        status = "503 Service Unavailable" if found else "200 OK"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{found or 'ok'}\n".encode()]

    server.set_app(answer)
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _impatient(handler: Any) -> Any:
    """Return a handler of HTTP that waits for `_SILENCE` at most: each connection has a thread."""

    class Impatient(handler):  # type: ignore[misc]
        timeout = _SILENCE

        def handle(self) -> None:
            # Without a traceback for whoever hangs up, or says nothing.
            with suppress(OSError):
                super().handle()

    return Impatient


class Spans:
    """Adds finished spans to the traces of jobs; without a tracer, none."""

    def __init__(self, tracer: "Tracer | None" = None, share: float = 0.0) -> None:
        self._tracer = tracer
        self._share = share

    def start_traces(self, key: str, jobs: "Iterable[types_pb2.JobSpec]") -> None:
        """Give the jobs that belong to no trace of their client's one, for a share of submissions.

        `key` is the submission's idempotency key: sent again, it must give the same jobs.
        """
        digest = hashlib.blake2b(key.encode(), digest_size=28).digest()
        if not key or int.from_bytes(digest[24:], "little") >= self._share * 2**32:
            return
        parent = f"00-{digest[:16].hex()}-{digest[16:24].hex()}-01"
        for job in jobs:
            if not job.traceparent:
                job.traceparent = parent

    def record(
        self, name: str, parent: str, seconds: float, **attributes: str | int | float
    ) -> None:
        """Add a span that ends now, if `parent` is a ``traceparent`` of a trace that is sampled."""
        if self._tracer is None or not parent:
            return
        from opentelemetry.trace import get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent})
        if not get_current_span(context).get_span_context().trace_flags.sampled:
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=context,
            start_time=now - int(seconds * 1e9),
            attributes={f"reltrace.{key}": value for key, value in attributes.items()},
        )
        span.end(now)


@contextmanager
def exporting_spans(endpoint: str | None, service: str, share: float = 0.0) -> Iterator[Spans]:
    """Send spans to a collector, by OTLP over gRPC, until the block ends.

    Parameters
    ----------
    endpoint : str or None
        ``http://HOST:PORT``, or ``https://`` for TLS; None: no spans are sent. Headers and
        certificates are set by the variables of OpenTelemetry, such as OTEL_EXPORTER_OTLP_HEADERS.
    service : str
        The distribution that sends them.
    share : float
        Of submissions whose client traces nothing, how many are traced all the same.
    """
    if endpoint is None:
        yield Spans()
        return
    if not endpoint.startswith(("http://", "https://")):
        raise SettingError(f"--traces {endpoint}", "must be a URL such as http://127.0.0.1:4317")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingError(
            "--traces", f'needs the packages of: pip install "{service}[otel]" ({error})'
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    # Its queue is bounded: what a collector that is away does not take is dropped.
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield Spans(provider.get_tracer(service), share)
    finally:
        provider.shutdown()
