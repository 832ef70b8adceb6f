"""Spans of jobs for OpenTelemetry, by option.

A job carries the span of the client's that it belongs to, as ``traceparent`` of the W3C's Trace
Context. Scheduler and worker add what they did for it, after the fact, with the times at which it
was done: nothing is kept open.
"""

import hashlib
import time
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from reltrace_proto.v1 import types_pb2

from reltrace_scheduler.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Tracer

SERVICE = "reltrace-scheduler"


class Spans(Protocol):
    """Takes spans that are over."""

    def adopt(self, key: str, jobs: Iterable[types_pb2.JobSpec]) -> None:
        """Give jobs that belong to no span of their client's one, or none: some are followed.

        Parameters
        ----------
        key : str
            The submission's idempotency key: sent again, it must not change the jobs.
        """

    def record(
        self, name: str, parent: str, seconds: float, **attributes: str | int | float
    ) -> None:
        """Add a span that ends now.

        Parameters
        ----------
        parent : str
            A ``traceparent``; empty, or of a trace that is not sampled: nothing is added.
        seconds : float
            How long it took.
        """


class NoSpans:
    """Where nobody asked for them."""

    def adopt(self, key: str, jobs: Iterable[types_pb2.JobSpec]) -> None:
        """Leave the jobs as they are."""

    def record(
        self, name: str, parent: str, seconds: float, **attributes: str | int | float
    ) -> None:
        """Add nothing."""


@contextmanager
def exporting(endpoint: str, share: float) -> "Iterator[Spans]":
    """Send spans to a collector, by OTLP over gRPC, until the block ends.

    Parameters
    ----------
    endpoint : str
        ``http://HOST:PORT``, or ``https://`` for TLS. Headers and certificates are set by the
        variables of OpenTelemetry, OTEL_EXPORTER_OTLP_HEADERS for example.
    share : float
        Of submissions without a span of their client's, how many are followed.

    Raises
    ------
    StartError
        The packages are not installed, or it is no such URL.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise StartError(f"--traces {endpoint}: must be a URL such as http://127.0.0.1:4317")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartError(f'--traces: pip install "{SERVICE}[otel]" ({error})') from error
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    # Bounded: what a collector that is away does not take is dropped.
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield _Exported(provider.get_tracer(SERVICE), share)
    finally:
        provider.shutdown()


class _Exported:
    """Spans that are sent to a collector."""

    def __init__(self, tracer: "Tracer", share: float) -> None:
        from opentelemetry.trace import get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._span_of = get_current_span
        self._share = share
        self._propagator = TraceContextTextMapPropagator()

    def adopt(self, key: str, jobs: Iterable[types_pb2.JobSpec]) -> None:
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
        context = self._propagator.extract({"traceparent": parent})
        if not self._span_of(context).get_span_context().trace_flags.sampled:
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=context,
            start_time=now - int(seconds * 1e9),
            attributes={f"reltrace.{key}": value for key, value in attributes.items()},
        )
        span.end(now)
