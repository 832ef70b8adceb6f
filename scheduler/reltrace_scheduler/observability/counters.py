"""What one scheduler counts: sum it over schedulers."""

from prometheus_client import CollectorRegistry, Counter, Histogram

# Seconds of calls: from a look at Redis to a submission of many megabytes.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Counts:
    """The counters of a scheduler, and the registry that they are exported from.

    Labels are few by design: models, tenants and states, never jobs or workers.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"reltrace_{name}", what, labels, registry=self.registry)

        self.submitted = counter("jobs_submitted", "Jobs that were accepted.", "tenant", "priority")
        self.ended = counter(
            "jobs_ended", "Jobs whose end this scheduler stored.", "model", "tenant", "state"
        )
        self.leased = counter("leases", "Jobs that were given to workers.", "model")
        self.lost = counter("leases_lost", "Leases whose worker fell silent.", "model")
        self.retried = counter(
            "attempts_failed", "Attempts that failed for a reason that may pass.", "model"
        )
        self.result_bytes = counter("result_bytes", "Bytes of results that workers sent.", "model")
        self.calls = Histogram(
            "reltrace_grpc_seconds",
            "Time of unary calls.",
            ("method", "code"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.streams = counter(
            "grpc_streams_ended", "Streams that ended, by status.", "method", "code"
        )
