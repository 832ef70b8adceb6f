"""Serves the metrics over HTTP, and keeps those of the cluster fresh."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import structlog
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.observability.counters import Counts
from reltrace_scheduler.queue.gauges import ClusterState, Gauges
from reltrace_scheduler.tasks import end

log = structlog.get_logger()

_PERIOD = 5.0
"""Seconds between looks at the cluster: what Prometheus reads is as old as this at most."""

_QUEUE = ("model", "tenant", "priority")


class ClusterCollector(Collector):
    """What every scheduler says alike of the cluster: take the maximum over schedulers."""

    def __init__(self) -> None:
        # None: Redis does not answer.
        self.state: ClusterState | None = None

    def collect(self) -> Iterator[Metric]:
        """Give the metrics of the last look."""
        state = self.state
        yield GaugeMetricFamily(
            "reltrace_redis_up", "Whether Redis answers.", 0 if state is None else 1
        )
        if state is None:
            return
        queued = GaugeMetricFamily("reltrace_queue_jobs", "Jobs that wait.", labels=_QUEUE)
        leased = GaugeMetricFamily("reltrace_leased_jobs", "Jobs at workers.", labels=_QUEUE)
        oldest = GaugeMetricFamily(
            "reltrace_queue_oldest_seconds", "Age of the job that waits longest.", labels=_QUEUE
        )
        for queue in state.queues:
            labels = (queue.model, queue.tenant, queue.priority)
            queued.add_metric(labels, queue.queued)
            leased.add_metric(labels, queue.leased)
            oldest.add_metric(labels, queue.oldest)
        workers = GaugeMetricFamily("reltrace_workers", "Connected workers.", labels=["model"])
        for model, count in state.workers.items():
            workers.add_metric([model], count)
        ended = CounterMetricFamily(
            "reltrace_cluster_jobs_ended", "Jobs that ended, in all.", labels=["state"]
        )
        for name, count in state.ended.items():
            ended.add_metric([name.lower()], count)
        yield from (queued, leased, oldest, workers, ended)
        yield GaugeMetricFamily(
            "reltrace_redis_memory_bytes", "Memory that Redis uses.", state.memory
        )


@contextlib.asynccontextmanager
async def exporting(listen: str, counts: Counts, gauges: Gauges) -> AsyncIterator[str]:
    """Serve the metrics until the block ends; gives the address.

    Parameters
    ----------
    listen : str
        ``HOST:PORT``; port 0: any free one.

    Raises
    ------
    StartError
        The address can not be bound.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise StartError(f"--metrics {listen}: must be HOST:PORT, such as 127.0.0.1:9464")
    collector = ClusterCollector()
    counts.registry.register(collector)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), counts.registry)
    except OSError as error:
        raise StartError(f"--metrics {listen}: {error.strerror or error}") from error
    looking = asyncio.create_task(_look(collector, gauges))
    try:
        yield f"{host}:{server.server_port}"
    finally:
        await end([looking])
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


async def _look(collector: ClusterCollector, gauges: Gauges) -> None:
    while True:
        try:
            async with asyncio.timeout(_PERIOD):
                collector.state = await gauges.read()
        except (RedisError, OSError, TimeoutError) as error:
            if collector.state is not None:
                log.warning("metrics.stale", error=str(error))
            collector.state = None
        await asyncio.sleep(_PERIOD)
