"""The worker's Prometheus metrics; README.md lists their names."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from reltrace_proto.telemetry import serving_metrics


@dataclass(slots=True)
class PassStats:
    """What the passes over one model have done since the worker started."""

    passes: int = 0
    # Jobs that they ended: well, and not.
    jobs: int = 0
    failed: int = 0
    # Tokens that they took, and that they had room for.
    tokens: int = 0
    capacity: int = 0
    # By phase of the pass.
    seconds: dict[str, float] = field(default_factory=dict)
    # By tenant: its share of the time of each pass, by tokens.
    tenant_seconds: dict[str, float] = field(default_factory=dict)

    def charge_tenants(self, seconds: float, tokens: Mapping[str, int]) -> None:
        """Divide the time of a pass among tenants, by their tokens."""
        total = sum(tokens.values())
        for tenant, count in tokens.items():
            before = self.tenant_seconds.get(tenant, 0.0)
            self.tenant_seconds[tenant] = before + seconds * count / max(1, total)


class WorkerCollector(Collector):
    """Gives the statistics as they are when Prometheus asks; other threads change them.

    `stats` are by model; `memory` returns bytes of device memory by kind, `silent` the seconds
    since what is under way last went on.
    """

    def __init__(
        self,
        stats: Mapping[str, PassStats],
        memory: Callable[[], dict[str, int]],
        silent: Callable[[], float] = float,
    ) -> None:
        self._stats = stats
        self._memory = memory
        self._silent = silent

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""

        def counter(name: str, what: str, *labels: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"reltrace_worker_{name}", what, labels=("model", *labels))

        passes = counter("passes", "Passes that ran.")
        tokens = counter("tokens", "Tokens that passes took.")
        capacity = counter("capacity_tokens", "Tokens that they had room for.")
        jobs = counter("jobs", "Jobs that passes ended.", "outcome")
        seconds = counter("seconds", "Time of passes.", "phase")
        tenants = counter("tenant_seconds", "Time of passes, by whose tokens they took.", "tenant")
        for model, stats in self._stats.items():
            passes.add_metric([model], stats.passes)
            tokens.add_metric([model], stats.tokens)
            capacity.add_metric([model], stats.capacity)
            jobs.add_metric([model, "succeeded"], stats.jobs)
            jobs.add_metric([model, "failed"], stats.failed)
            for phase, value in dict(stats.seconds).items():
                seconds.add_metric([model, phase], value)
            for tenant, value in dict(stats.tenant_seconds).items():
                tenants.add_metric([model, tenant], value)
        memory = GaugeMetricFamily(
            "reltrace_worker_device_memory_bytes", "Memory of the GPU.", labels=["kind"]
        )
        for kind, count in self._memory().items():
            memory.add_metric([kind], count)
        silent = GaugeMetricFamily(
            "reltrace_worker_silent_seconds",
            "Time since the pass that is under way last went on; 0: none is.",
            self._silent(),
        )
        yield from (passes, tokens, capacity, jobs, seconds, tenants, memory, silent)


@contextmanager
def exporting(listen: str, collector: Collector, fault: Callable[[], str] = str) -> Iterator[str]:
    """Serve metrics of the collector and of this process; see `serving_metrics`."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    with serving_metrics(listen, registry, fault) as address:
        yield address
