"""What the store takes and gives, free of Redis and protobuf."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to accept."""

    model: str
    spec: bytes
    """A serialized ``JobSpec``."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What was accepted, now or when the idempotency key was first seen."""

    id: str
    jobs: int
    deduplicated: bool

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs, in the order in which they were submitted."""
        return [f"{self.id}-{index}" for index in range(self.jobs)]


@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job that a worker now holds."""

    job_id: str
    attempt: int
    spec: bytes
    queued_at: float
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Names a lease: the worker is known from the session."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk of a result, as a worker sends it."""

    lease: Lease
    number: int
    end: str
    """State in which the job ends with this chunk; empty: it goes on."""
    data: bytes
    """A serialized ``ResultChunk``."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of a result, as a client reads it."""

    entry: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Condemned:
    """A job that lost too many leases."""

    job_id: str
    attempt: int
    history: tuple[str, ...]
    """One line per lost lease: attempt, worker, Unix time in milliseconds."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """State of a job."""

    job_id: str
    state: str
    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A connected worker."""

    worker_id: str
    model: str
    info: bytes
    """A serialized ``ModelInfo``."""
    device: str
    version: str
    connected_at: float
    seen_at: float


@dataclass(frozen=True, slots=True)
class QueueRecord:
    """Depth of one model's queue."""

    model: str
    queued: int
    leased: int
    leased_by: dict[str, int]
    """Leases by worker id."""
