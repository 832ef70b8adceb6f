"""What an operator can set: the options of `reltrace-scheduler`, and fixed limits."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from reltrace_proto.options import option
from reltrace_proto.telemetry import LogFormat

from reltrace_scheduler.errors import StartError


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
    """Options and, without the annotation of one, tuning of the queue."""

    listen: Annotated[str, option("HOST:PORT to serve on; port 0: any free port.")] = (
        "127.0.0.1:50051"
    )
    redis: Annotated[
        str | None,
        option(
            "URL of a Redis, 6.2 or newer: redis://, rediss:// or unix://. Without it, the "
            "scheduler starts one of its own, with its data under --data."
        ),
    ] = None
    redis_url_file: Annotated[
        Path | None, option("File that holds this URL, with the password in it.")
    ] = None
    redis_password_file: Annotated[
        Path | None,
        option(
            "File that holds the password of the Redis; or put the password into "
            "RELTRACE_REDIS_PASSWORD."
        ),
    ] = None
    redis_ca: Annotated[
        Path | None,
        option(
            "With rediss://: PEM file of the authorities to trust. (default: the system's)",
            show_default=False,
        ),
    ] = None
    data: Annotated[Path | None, option("Folder of the scheduler's own Redis.")] = None
    fsync: Annotated[
        Fsync, option("When the scheduler's own Redis writes its file to the disk.")
    ] = Fsync.EVERYSEC
    lease: Annotated[
        float, option("Seconds without a heartbeat after which a lease is lost.", min=0.5)
    ] = 30.0
    result_ttl: Annotated[
        float, option("Seconds that results are kept that nobody has fetched.", min=1)
    ] = 3600.0
    max_lost_leases: Annotated[
        int, option("Lost leases after which a job is quarantined.", min=1)
    ] = 3
    max_jobs: Annotated[int, option("Jobs that may be queued or leased at a time.", min=1)] = (
        100_000
    )
    max_bytes: Annotated[
        int, option("Bytes of their specifications and of unread results.", min=1)
    ] = 4 << 30
    tenant_max_jobs: Annotated[
        int, option("--max-jobs of each tenant that has no bound of its own.", min=1)
    ] = 50_000
    tenant_max_bytes: Annotated[
        int, option("--max-bytes of each tenant that has no bound of its own.", min=1)
    ] = 1 << 30
    results_url: Annotated[
        str,
        option(
            "Folder for tensors that are too large for Redis, which workers write and clients "
            "read: file:///SHARED/FOLDER, s3://BUCKET/FOLDER, ... (default: all go through Redis)",
            show_default=False,
        ),
    ] = ""
    results_above: Annotated[
        int, option("Bytes of a job's tensors above which they go to --results-url.", min=0)
    ] = 8 << 20
    output_uri: Annotated[
        tuple[str, ...],
        option(
            "Folder that clients may have workers write tensors to, with all folders in it; may be "
            "given several times. (default: none)",
            show_default=False,
        ),
    ] = ()
    shards: Annotated[
        int,
        option(
            "Parts of the queue, each in a slot of its own of a Redis Cluster; the same for all "
            "schedulers. Each has an equal part of all bounds.",
            min=1,
            max=1000,
        ),
    ] = 1
    tokens: Annotated[
        Path | None,
        option(
            "File of the tokens that callers need, as `reltrace-scheduler token` writes it. "
            "Without it, everybody may do everything."
        ),
    ] = None
    tls_cert: Annotated[
        Path | None, option("PEM file of the server's certificate.", env="LISTEN_TLS_CERT")
    ] = None
    tls_key: Annotated[Path | None, option("PEM file of its key.", env="LISTEN_TLS_KEY")] = None
    tls_client_ca: Annotated[
        Path | None,
        option(
            "PEM file of the authorities whose clients may connect (mutual TLS).",
            env="LISTEN_TLS_CLIENT_CA",
        ),
    ] = None
    insecure: Annotated[
        bool,
        option(
            "Serve other machines without TLS or without tokens.",
            "--insecure",
            env="LISTEN_INSECURE",
        ),
    ] = False
    max_requests_per_second: Annotated[
        float | None,
        option("Calls of one token, over all schedulers. (default: no limit)", min=0.001),
    ] = None
    max_jobs_per_second: Annotated[
        float | None,
        option("Jobs that one token submits, over all schedulers. (default: no limit)", min=0.001),
    ] = None
    metrics: Annotated[
        str | None,
        option(
            "Where Prometheus reads metrics, over plain HTTP. (default: nowhere)",
            metavar="HOST:PORT",
        ),
    ] = None
    web: Annotated[
        str | None,
        option(
            "Where a read-only page shows queues, workers and recent jobs to operators. "
            "(default: nowhere)",
            metavar="HOST:PORT",
        ),
    ] = None
    traces: Annotated[
        str | None,
        option(
            "Where an OpenTelemetry collector takes spans of jobs (OTLP over gRPC), such as "
            "http://127.0.0.1:4317. (default: nowhere)",
            metavar="URL",
        ),
    ] = None
    traces_share: Annotated[
        float,
        option(
            "With --traces: share of the submissions without a client's span that is traced.",
            min=0,
            max=1,
        ),
    ] = 0.01
    log_level: Annotated[str, option("debug, info, warning or error.")] = "info"
    log_format: Annotated[LogFormat, option("For people, or one JSON object per line.")] = (
        LogFormat.CONSOLE
    )

    retry_delay: float = 1.0
    """Seconds a job waits after its first failed attempt; twice as long after each further one."""
    max_failures: int = 3
    """Failed attempts after which a job is tried again; the next one is final."""
    max_unread: int = 64 << 20
    """Bytes of unread results at which a submission's further jobs wait for its reader."""
    max_quarantined: int = 1000
    """Quarantined jobs that are kept for an operator to look at."""
    quarantine_ttl: float = 7 * 24 * 3600.0
    """Seconds they are kept."""

    @property
    def heartbeat(self) -> float:
        """Seconds between a worker's heartbeats: two may be missed."""
        return self.lease / 3


def host_and_port(option: str, address: str) -> tuple[str, int]:
    """Return the host and the port of an address that an option names.

    Raises
    ------
    StartError
        It is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise StartError(f"{option} {address}: must be HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)
