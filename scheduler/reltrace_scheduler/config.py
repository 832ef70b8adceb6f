"""What an operator can set: the options of `reltrace-scheduler`, and fixed limits."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from reltrace_proto.options import option
from reltrace_proto.telemetry import LogFormat


class Fsync(StrEnum):
    """When the embedded Redis writes its file to the disk (Redis' `appendfsync`)."""

    ALWAYS = "always"
    """Before each answer: a machine that loses power loses nothing that was accepted."""
    EVERYSEC = "everysec"
    """Each second: at most the last two seconds are lost, by a machine that loses power, or
    by a server that is killed while its disk is slow."""
    NO = "no"
    """When the system does: up to half a minute is lost."""


@dataclass(frozen=True)
class Settings:
    """Options of the command, and fixed settings of the queue."""

    listen: str = option("127.0.0.1:50051", "HOST:PORT to serve on; port 0: any free port.")
    redis: str | None = option(
        None,
        "URL of a Redis, 6.2 or newer: redis://HOST, rediss://HOST (TLS) or unix:///PATH; of nodes "
        "of a Redis Cluster: redis://HOST,HOST; of Sentinels: redis+sentinel://HOST,HOST/NAME. "
        "Without it, the scheduler starts one of its own, with its data under --data.",
    )
    redis_url_file: Path | None = option(None, "File that holds this URL, with its password.")
    redis_password_file: Path | None = option(
        None,
        "File that holds the password of the Redis; or put the password into "
        "RELTRACE_REDIS_PASSWORD.",
    )
    redis_ca: Path | None = option(
        None, "With TLS to Redis: PEM file of the authorities to trust. (default: the system's)"
    )
    allow_volatile_redis: bool = option(
        False,
        "Accept a Redis that writes no append-only file or may evict keys: jobs that were accepted "
        "may be lost.",
    )
    redis_replicas: int = option(
        0,
        "Replicas of the Redis that must have a submission or a result before it is answered for.",
        min=0,
        max=100,
    )
    data: Path | None = option(None, "Folder of the scheduler's own Redis.")
    fsync: Fsync = option(
        Fsync.EVERYSEC, "When the scheduler's own Redis writes its file to the disk."
    )
    lease: float = option(30.0, "Seconds without a heartbeat after which a lease is lost.", min=0.5)
    result_ttl: float = option(
        3600.0, "Seconds that results are kept if they are not fetched.", min=1
    )
    max_lost_leases: int = option(3, "Lost leases after which a job is quarantined.", min=1)
    max_jobs: int = option(100_000, "Jobs that may be queued or leased at a time.", min=1)
    max_bytes: int = option(4 << 30, "Bytes of their specifications and of unread results.", min=1)
    tenant_max_jobs: int = option(
        50_000, "--max-jobs of each tenant that has no bound of its own.", min=1
    )
    tenant_max_bytes: int = option(
        1 << 30, "--max-bytes of each tenant that has no bound of its own.", min=1
    )
    max_result_bytes: int = option(
        64 << 20,
        "Bytes of one job's result that go through Redis; a job that would have more fails, unless "
        "its tensors go to --results-url or --output-uri.",
        min=1 << 16,
    )
    results_url: str = option(
        "",
        "Folder for tensors that are too large for Redis, which workers write and clients read: "
        "file:///SHARED/FOLDER, s3://BUCKET/FOLDER, ... (default: all go through Redis)",
    )
    results_above: int = option(
        8 << 20, "Bytes of a job's tensors above which they go to --results-url.", min=0
    )
    output_uri: tuple[str, ...] = option(
        (),
        "Folder that clients may have workers write tensors to, with all folders in it, such as "
        "s3://BUCKET/{tenant}: each tenant has its own; without {tenant} it is all tenants'. May "
        "be given several times. (default: none)",
    )
    shards: int = option(
        1,
        "Parts of the queue, each in a slot of its own of a Redis Cluster; the same for all "
        "schedulers. Each has an equal part of all bounds.",
        min=1,
        max=1000,
    )
    tokens: Path | None = option(
        None,
        "File of the tokens that callers need, as `reltrace-scheduler token` writes it. Without "
        "it, every caller may do everything.",
    )
    tls_cert: Path | None = option(
        None, "PEM file of the server's certificate.", env="LISTEN_TLS_CERT"
    )
    tls_key: Path | None = option(None, "PEM file of its key.", env="LISTEN_TLS_KEY")
    tls_client_ca: Path | None = option(
        None,
        "PEM file of the authorities whose clients may connect (mutual TLS).",
        env="LISTEN_TLS_CLIENT_CA",
    )
    insecure: bool = option(
        False, "Serve other machines without TLS or without tokens.", env="LISTEN_INSECURE"
    )
    max_requests_per_second: float | None = option(
        None, "Calls of one token, over all schedulers. (default: no limit)", min=0.001
    )
    max_jobs_per_second: float | None = option(
        None, "Jobs that one token submits, over all schedulers. (default: no limit)", min=0.001
    )
    metrics: str | None = option(
        None,
        "Where Prometheus reads metrics, over plain HTTP. (default: nowhere)",
        metavar="HOST:PORT",
    )
    insecure_metrics: bool = option(
        False, "Let other machines read the metrics, which have neither TLS nor tokens."
    )
    web: str | None = option(
        None,
        "Where a read-only page shows queues, workers and recent jobs to operators. "
        "(default: nowhere)",
        metavar="HOST:PORT",
    )
    traces: str | None = option(
        None,
        "Where an OpenTelemetry collector takes spans of jobs (OTLP over gRPC), such as "
        "http://127.0.0.1:4317. (default: nowhere)",
        metavar="URL",
    )
    traces_share: float = option(
        0.01,
        "With --traces: share of the submissions without a client's span that is traced.",
        min=0,
        max=1,
    )
    log_level: str = option("info", "debug, info, warning or error.")
    log_format: LogFormat = option(LogFormat.CONSOLE, "For people, or one JSON object per line.")

    retry_delay: float = 1.0
    """Seconds a job waits after its first failed attempt; twice as long after each further one."""
    max_failures: int = 3
    """Failed attempts after which a job is tried again; the next one is final."""
    max_unread: int = 64 << 20
    """Bytes of unread results at which a submission's further jobs wait for its reader."""
    reader_patience: float = 300.0
    """Seconds that unread results without a reader may keep out other jobs of their tenant."""
    max_quarantined: int = 1000
    """Quarantined jobs that are kept for an operator to look at."""
    quarantine_ttl: float = 7 * 24 * 3600.0
    """Seconds they are kept."""
    model_ttl: float = 7 * 24 * 3600.0
    """Seconds without a worker after which a model is forgotten, and jobs for it fail."""
    connection_age: float = 600.0
    """Seconds after which callers are to connect again, so that they spread over schedulers that
    came later; with jitter, so that they do not come all at once."""

    @property
    def heartbeat(self) -> float:
        """Seconds between a worker's heartbeats: two may be missed."""
        return self.lease / 3
