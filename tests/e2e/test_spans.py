"""One job's spans, from the client's own to the worker's, at a collector."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import reltrace
from e2e.conftest import Process, wait_until
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider

Start = Callable[..., Process]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what comes by OTLP."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        """The service's name, and the span."""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            (service,) = [
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            ]
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, trace_id: int) -> dict[str, tuple[str, Any]]:
        """The spans of one trace, by name."""
        wanted = trace_id.to_bytes(16, "big")
        return {s.name: (service, s) for service, s in self.spans if s.trace_id == wanted}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None)


def test_a_job_is_followed(start: Start, tmp_path: Path, collector: tuple[Collector, str]) -> None:
    """
    Given a client that is inside a span, and a scheduler and a worker with --traces
    I expect the spans of submission, queue, lease and pass as children of the client's, with the
    job's id and tenant; and of a client that traces nothing, those that were asked for.
    """
    received, url = collector
    scheduler = start(
        "reltrace_scheduler", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0",
        "--traces", url, "--traces-share", "1", "--log-format", "json",
        OTEL_BSP_SCHEDULE_DELAY="100",
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    start(
        "reltrace_worker", "--scheduler", address, "--model", "demo", "--threads", "1",
        "--max-tokens", "512", "--traces", url, OTEL_BSP_SCHEDULE_DELAY="100",
    )  # fmt: skip
    tracer = TracerProvider().get_tracer("test")
    names = {"reltrace.submit", "reltrace.queued", "reltrace.lease", "reltrace.pass"}
    with reltrace.Client(address, retry_timeout=100) as client:
        with tracer.start_as_current_span("mine") as mine:
            trace = client.trace("My cats love to play with my")
        context = mine.get_span_context()
        wait_until(lambda: received.named(context.trace_id).keys() >= names, "all spans come", 30)
        found = received.named(context.trace_id)
        parents = {span.parent_span_id for _, span in found.values()}
        assert parents == {context.span_id.to_bytes(8, "big")}
        assert {name: service for name, (service, _) in found.items()} == {
            "reltrace.submit": "reltrace-scheduler",
            "reltrace.queued": "reltrace-scheduler",
            "reltrace.lease": "reltrace-worker",
            "reltrace.pass": "reltrace-worker",
        }
        _, span = found["reltrace.pass"]
        said = {attribute.key: attribute.value for attribute in span.attributes}
        assert said["reltrace.job"].string_value == trace.job_id
        assert said["reltrace.tenant"].string_value == "default"
        assert said["reltrace.tokens"].int_value == len(trace.tokens)
        assert mine.start_time < span.start_time_unix_nano < span.end_time_unix_nano
        assert span.end_time_unix_nano - span.start_time_unix_nano < 30e9

        received.spans.clear()
        client.trace("My cats love to play with my")
        wait_until(lambda: {s.name for _, s in received.spans} == names, "spans without mine", 30)
        assert len({s.trace_id for _, s in received.spans}) == 1
