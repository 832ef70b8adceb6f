"""The metrics of a scheduler for Prometheus; README.md lists their names."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from reltrace_proto.telemetry import serving_metrics

from reltrace_scheduler.queue.gauges import ClusterState, read_cluster
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.queue.trouble import REDIS_ERRORS, log_trouble
from reltrace_scheduler.tasks import end

_PERIOD = 5.0
"""Seconds between reads of the cluster's state: what Prometheus gets is as old as this at most."""

# Seconds of calls: from a read of Redis to a submission of many megabytes.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
MAINTENANCE_STEPS = (
    "expire", "timeouts", "delays", "watchdog", "leases", "stalled", "workers",
    "models", "tenants", "metrics", "bounds",
)  # fmt: skip
_QUEUE = ("model", "tenant", "priority")


class Counts:
    """The counters of one scheduler (sum them over schedulers), and the registry of all metrics.

    Labels are few by design: models, tenants and states, never jobs or workers.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        self._counters: list[Counter] = []

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(f"reltrace_{name}", text, labels, registry=self.registry)
            self._counters.append(made)
            return made

        self.submitted = counter("jobs_submitted", "Jobs that were accepted.", "tenant", "priority")
        self.ended = counter(
            "jobs_ended", "Jobs whose end this scheduler stored.", "model", "tenant", "state"
        )
        self.leased = counter("leases", "Jobs that were leased to workers.", "model")
        self.lost = counter("leases_lost", "Leases whose worker stopped its heartbeats.", "model")
        self.retried = counter(
            "attempts_failed", "Attempts that failed for a reason that may pass.", "model"
        )
        self.result_bytes = counter("result_bytes", "Bytes of results that workers sent.", "model")
        self.streams = counter(
            "grpc_streams_ended", "Streams that ended, by status.", "method", "code"
        )
        self.maintenance_failures = counter(
            "maintenance_failures", "Steps of the queue's maintenance that failed.", "step"
        )
        for step in MAINTENANCE_STEPS:
            # From 0 on: what a series begins with is no increase.
            self.maintenance_failures.labels(step)
        self.calls = Histogram(
            "reltrace_grpc_seconds",
            "Time of unary calls.",
            ("method", "code"),
            buckets=_BUCKETS,
            registry=self.registry,
        )

    def labels(self, *names: str) -> set[tuple[str, str]]:
        """Return the names and values of labels that counters have, of so many names."""
        return {
            (name, sample.labels[name])
            for metric in self._counters
            for sample in _samples(metric)
            for name in names
            if name in sample.labels
        }

    def forget(self, name: str, value: str) -> None:
        """Remove what is counted under a value of a label."""
        for metric in self._counters:
            found = {
                tuple(sample.labels.values())
                for sample in _samples(metric)
                if sample.labels.get(name) == value
            }
            for values in found:
                metric.remove(*values)


def _samples(metric: Counter) -> Iterator[Sample]:
    for family in metric.collect():
        yield from family.samples


class ClusterCollector(Collector):
    """Metrics of the whole cluster, the same at every scheduler: take the maximum over them."""

    def __init__(self) -> None:
        # None: Redis does not answer, or takes no writes.
        self.state: ClusterState | None = None

    def collect(self) -> Iterator[Metric]:
        state = self.state
        up = 0 if state is None else 1
        yield GaugeMetricFamily("reltrace_redis_up", "Whether Redis answers and takes writes.", up)
        if state is None:
            return
        queues = [((queue.model, queue.tenant, queue.priority), queue) for queue in state.queues]
        for name, text, field in (
            ("queue_jobs", "Jobs that are queued.", "queued"),
            ("leased_jobs", "Jobs that are leased.", "leased"),
            ("queue_oldest_seconds", "Time since the oldest queued job came.", "oldest"),
        ):
            values = [(labels, getattr(queue, field)) for labels, queue in queues]
            yield _family(GaugeMetricFamily, name, text, _QUEUE, values)
        workers = [((model,), count) for model, count in state.workers.items()]
        yield _family(GaugeMetricFamily, "workers", "Connected workers.", ("model",), workers)
        ended = [((name.lower(),), count) for name, count in state.ended.items()]
        yield _family(
            CounterMetricFamily,
            "cluster_jobs_ended",
            "Jobs that ended, by state.",
            ("state",),
            ended,
        )
        yield GaugeMetricFamily(
            "reltrace_redis_memory_bytes", "Memory that Redis uses.", state.memory
        )
        yield GaugeMetricFamily(
            "reltrace_redis_memory_used_ratio",
            "Part of its maxmemory that the fullest Redis uses; 0: it has none.",
            state.used_part,
        )


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    family = kind(f"reltrace_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


@contextlib.asynccontextmanager
async def exporting(listen: str, counts: Counts, store: Store) -> AsyncIterator[None]:
    """Serve the metrics over HTTP until the block ends; see `serving_metrics`."""
    collector = ClusterCollector()
    counts.registry.register(collector)
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving_metrics(listen, counts.registry))
        reading = asyncio.create_task(_read_state(collector, store))
        try:
            yield
        finally:
            await end([reading])
            await asyncio.to_thread(stack.close)


async def _read_state(collector: ClusterCollector, store: Store) -> None:
    while True:
        try:
            async with asyncio.timeout(_PERIOD):
                await store.check_writes()
                collector.state = await read_cluster(store)
        except REDIS_ERRORS as error:
            log_trouble("metrics.stale", error)
            collector.state = None
        await asyncio.sleep(_PERIOD)
