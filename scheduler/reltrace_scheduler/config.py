"""What an operator can set, as one documented dataclass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Bounds and times of the queue."""

    lease: float = 30.0
    """Seconds after which an unrenewed lease is lost."""

    result_ttl: float = 3600.0
    """Seconds that results of a finished submission are kept without acknowledgement."""

    max_lost_leases: int = 3
    """A job that loses this many leases is quarantined."""

    retry_delay: float = 1.0
    """Seconds a job waits after its first failed attempt; twice as long after each further one."""

    max_failures: int = 3
    """Failed attempts after which a job is tried again; the next one is final."""

    max_jobs: int = 100_000
    """Jobs that may be queued or leased at a time."""

    max_bytes: int = 4 << 30
    """Bytes of their specifications, and of results that nobody has read."""

    tenant_max_jobs: int = 50_000
    """The same for each tenant that has no bound of its own."""

    tenant_max_bytes: int = 1 << 30
    """The same for each tenant that has no bound of its own."""

    shards: int = 1
    """Parts of the queue; each may be on a node of its own of a Redis Cluster."""

    max_unread: int = 64 << 20
    """Bytes of unread results at which a submission's further jobs wait for its reader."""

    results_url: str = ""
    """Folder, as a URL, of results that are too large for Redis; empty: none is."""

    results_above: int = 8 << 20
    """Bytes of tensors above which a result is."""

    output_uris: tuple[str, ...] = ()
    """Folders, as URLs, that clients may have workers write tensors to."""

    keep_recent: bool = False
    """Note some of the jobs that end, and pictures of some, for people to look at."""

    max_quarantined: int = 1000
    """Quarantined jobs that are kept for an operator to look at."""

    quarantine_ttl: float = 7 * 24 * 3600.0
    """Seconds they are kept."""

    @property
    def heartbeat(self) -> float:
        """Seconds between a worker's heartbeats: two may be missed."""
        return self.lease / 3


MAX_JOBS_PER_REQUEST = 1000
MAX_REQUEST_BYTES = 16 << 20
MAX_PROMPT_BYTES = 1 << 20
MAX_TARGETS_PER_JOB = 1024
MAX_MESSAGES = 1024
MAX_ROLE = 64
MAX_EDITS_PER_JOB = 256
MAX_NEW_TOKENS = 1024
MAX_CORPUS_PROMPTS = 1 << 16
MAX_ATLAS_PLACES = 64
MAX_TEMPERATURE = 100
MAX_EDITED_FEATURES = 65536
# A norm squares what flows through it, which has to stay within float32.
LARGEST_EDIT = 1e9

# Above our own limit, so that an over-long message gets an error that names it; what is
# longer still is refused by gRPC itself with RESOURCE_EXHAUSTED.
MAX_TRANSPORT_BYTES = 64 << 20
