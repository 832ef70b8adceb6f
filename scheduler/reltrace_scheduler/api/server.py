"""Puts the scheduler together and runs it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from reltrace_proto.telemetry import Spans
from reltrace_proto.v1 import admin_pb2_grpc, trace_pb2_grpc, worker_pb2_grpc

from reltrace_scheduler.api.admin import AdminService
from reltrace_scheduler.api.forgetting import Forgetting
from reltrace_scheduler.api.interceptor import SERVICES, CallInterceptor
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.api.reaper import Reaper, attempt
from reltrace_scheduler.api.result_store import Sweeper
from reltrace_scheduler.api.trace import TraceService
from reltrace_scheduler.api.worker import WorkerService
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.limits import (
    MAX_CONCURRENT_CALLS,
    MAX_CONCURRENT_STREAMS,
    MAX_TRANSPORT_BYTES,
)
from reltrace_scheduler.observability.metrics import Counts, exporting
from reltrace_scheduler.queue.connection import Connection
from reltrace_scheduler.queue.signals import Signals
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.queue.trouble import log_trouble
from reltrace_scheduler.tasks import end
from reltrace_scheduler.web.server import serving_page

log = structlog.get_logger()

_OPTIONS = (
    # gRPC unpacks a compressed message to any length before it looks at the limit.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_receive_message_length", MAX_TRANSPORT_BYTES),
    ("grpc.max_send_message_length", MAX_TRANSPORT_BYTES),
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    # Bytes of a stream that are received before they are read: enough for 10 MiB/s over 0.1 s. By
    # itself gRPC raises this without a bound.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    # Of those who connect and say nothing, TLS or not.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Two schedulers on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
    # Finds peers that vanished without closing.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

_MOST_AGE_GRACE = 3600.0
"""Seconds for which calls go on over a connection whose age is over: new ones take another."""

_STOP_GRACE = 2.0
"""Seconds for calls under way; streams to workers and clients are cut and resumed."""

_HEALTH_PERIOD = _BOUNDS_PERIOD = 1.0


@asynccontextmanager
async def serving(
    connection: Connection,
    settings: Settings,
    access: Access | None = None,
    spans: Spans | None = None,
    store: Store | None = None,
) -> AsyncIterator[str]:
    """Serve until the block ends; gives the address that clients use.

    By default every caller on this machine may do everything. `store` is one over `connection` that
    is open already.
    """
    listen, metrics, web = settings.listen, settings.metrics, settings.web
    access, spans = access or Access(), spans or Spans()
    access.check(listen)
    if metrics:
        access.check_metrics(metrics)
    if store is None:
        store = Store(connection.redis, settings)
        await store.open()
    signals = Signals(connection.redis)
    models, counts = ModelCache(store.registry), Counts()
    options = (
        *_OPTIONS,
        # gRPC adds a jitter of 10 %. Streams of workers end by themselves before.
        ("grpc.max_connection_age_ms", int(1000 * settings.connection_age)),
        ("grpc.max_connection_age_grace_ms", int(1000 * _MOST_AGE_GRACE)),
    )
    server = grpc.aio.server(
        interceptors=[CallInterceptor(access, connection.redis, counts)],
        options=options,
        maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
    )
    parts = (store, models, signals, counts, spans)
    trace_pb2_grpc.add_TraceServiceServicer_to_server(TraceService(*parts), server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(*parts), server)
    forgetting = Forgetting(store, counts)
    admin = AdminService(store, connection.version, forgetting)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    status = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection([*SERVICES, HEALTH_NAME, reflection.SERVICE_NAME], server)
    try:
        port = (
            server.add_insecure_port(listen)
            if access.tls is None
            else server.add_secure_port(listen, access.tls.credentials())
        )
    except RuntimeError as error:
        raise StartError(f"--listen {listen}: the address can not be used") from error
    exporter = exporting(metrics, counts, store) if metrics else contextlib.nullcontext()
    page = serving_page(web, store, access) if web else contextlib.nullcontext()
    await server.start()
    work = [
        signals.run(),
        *Reaper(store, counts).loops(),
        forgetting.run(),
        _report_health(store, status),
        _refresh_bounds(store, counts),
    ]
    if settings.results_url:
        work.append(Sweeper(store.results_url, store).run())
    tasks = [asyncio.create_task(each) for each in work]
    try:
        async with exporter, page as shown:
            if shown:
                log.info("page.served", url=shown)
            yield f"{listen.rpartition(':')[0]}:{port}"
    finally:
        await status.enter_graceful_shutdown()
        await end(tasks)
        await server.stop(_STOP_GRACE)


async def _refresh_bounds(store: Store, counts: Counts) -> None:
    """Keep the queue's bounds within Redis' memory, which can change, and which others may use."""
    while True:
        await asyncio.sleep(_BOUNDS_PERIOD)
        await attempt("bounds", store.bounds.refresh(), counts)


async def _report_health(store: Store, status: health.HealthServicer) -> None:
    """Serve NOT_SERVING, per service and in all, while Redis does not answer or takes no writes."""
    failed = False
    while True:
        try:
            await store.check_writes()
            state = health_pb2.HealthCheckResponse.SERVING
            if failed:
                log.info("redis.answers")
            failed = False
        except Exception as error:
            # Whatever it is: a report that has ended says for ever what it said last.
            state = health_pb2.HealthCheckResponse.NOT_SERVING
            log_trouble("redis.fails", error)
            failed = True
        for service in ("", *SERVICES):
            await status.set(service, state)
        await asyncio.sleep(_HEALTH_PERIOD)
