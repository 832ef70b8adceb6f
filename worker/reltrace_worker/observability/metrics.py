"""What Prometheus reads of a worker; README.md lists the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reltrace_worker.types.errors import WorkerError


class MetricsError(WorkerError):
    """The address for metrics can not be served."""


@dataclass(slots=True)
class PassStats:
    """What a worker's passes have done since it started.

    Attributes
    ----------
    passes, jobs, failed : int
        Passes, and the jobs that they ended: well, and not.
    tokens, capacity : int
        Tokens that they took, and that they had room for.
    seconds : dict of str to float
        By phase of the pass.
    tenant_seconds : dict of str to float
        By tenant: of the time of each pass, the part that its tokens were of the pass's.
    """

    passes: int = 0
    jobs: int = 0
    failed: int = 0
    tokens: int = 0
    capacity: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    tenant_seconds: dict[str, float] = field(default_factory=dict)

    def share(self, seconds: float, tokens: Mapping[str, int]) -> None:
        """Share the time of a pass out over tenants, by their tokens.

        Parameters
        ----------
        seconds : float
            Of the whole pass.
        tokens : mapping of str to int
            By tenant.
        """
        whole = sum(tokens.values())
        for tenant, own in tokens.items():
            spent = self.tenant_seconds.get(tenant, 0.0)
            self.tenant_seconds[tenant] = spent + seconds * own / whole


class WorkerCollector(Collector):
    """Gives the statistics of the passes, as they are when Prometheus asks.

    Parameters
    ----------
    stats : mapping of str to PassStats
        By model; changed by another thread.
    memory : callable
        Returns bytes of device memory by kind.
    """

    def __init__(
        self, stats: Mapping[str, PassStats], memory: Callable[[], dict[str, int]]
    ) -> None:
        self._stats = stats
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""

        def counter(name: str, what: str, *labels: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"reltrace_worker_{name}", what, labels=("model", *labels))

        passes = counter("passes", "Passes that ran.")
        tokens = counter("tokens", "Tokens that passes took.")
        capacity = counter("capacity_tokens", "Tokens that they had room for.")
        jobs = counter("jobs", "Jobs that passes ended.", "outcome")
        seconds = counter("seconds", "Time of passes.", "phase")
        shares = counter("tenant_seconds", "Time of passes, by whose tokens they took.", "tenant")
        for model, stats in self._stats.items():
            passes.add_metric([model], stats.passes)
            tokens.add_metric([model], stats.tokens)
            capacity.add_metric([model], stats.capacity)
            jobs.add_metric([model, "succeeded"], stats.jobs)
            jobs.add_metric([model, "failed"], stats.failed)
            for phase, value in dict(stats.seconds).items():
                seconds.add_metric([model, phase], value)
            for tenant, value in dict(stats.tenant_seconds).items():
                shares.add_metric([model, tenant], value)
        memory = GaugeMetricFamily(
            "reltrace_worker_device_memory_bytes", "Memory of the GPU.", labels=["kind"]
        )
        for kind, count in self._memory().items():
            memory.add_metric([kind], count)
        yield from (passes, tokens, capacity, jobs, seconds, shares, memory)


@contextmanager
def exporting(listen: str, collector: Collector) -> Iterator[str]:
    """Serve metrics over HTTP until the block ends; gives the address.

    Parameters
    ----------
    listen : str
        ``HOST:PORT``; port 0: any free one.

    Raises
    ------
    MetricsError
        The address is none, or can not be bound.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise MetricsError(f"--metrics {listen}: must be HOST:PORT, such as 127.0.0.1:9465")
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise MetricsError(f"--metrics {listen}: {error.strerror or error}") from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
