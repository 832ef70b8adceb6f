"""What the store takes and gives, free of Redis and protobuf."""

from dataclasses import dataclass
from enum import StrEnum

from reltrace_scheduler.keys import job_ids


class Priority(StrEnum):
    """Of a submission; also the class of the queues that its jobs start in."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to accept."""

    route: str
    """Name of the model, or NAME@REVISION."""
    spec: bytes
    """A serialized ``JobSpec``."""
    timeout: float = 0.0
    """Seconds within which it must end; 0: for ever."""
    sent: bytes = b""
    """The same as the client sent it, where that differs: by this a repeated one is known again."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What was accepted, now or when the idempotency key was first seen."""

    id: str
    jobs: int
    deduplicated: bool

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs, in the order in which they were submitted."""
        return job_ids(self.id, self.jobs)


@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job that a worker now holds."""

    job_id: str
    attempt: int
    spec: bytes
    queued_for: float
    """Seconds between its acceptance and this lease."""
    queue_class: str
    """Of the queue that it came from."""
    tenant: str
    route: str
    """The model, or the model and revision, that it was queued for."""


@dataclass(frozen=True, slots=True)
class Leased:
    """What a worker that asked a queue for jobs got."""

    jobs: tuple[LeasedJob, ...]
    idle: bool
    """Nothing waits there."""
    suspects: bool
    """Jobs wait that are leased only to a worker that holds nothing else."""


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
class NewDraft:
    """What is written of a text, as a worker sends it."""

    lease: Lease
    data: bytes
    """A serialized ``Draft``."""


@dataclass(frozen=True, slots=True)
class StoredDraft:
    """What is written of a text, as a client reads it."""

    position: str
    """Where to read on."""
    data: bytes
    """A serialized ``Draft``."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of a result, as a client reads it."""

    entry: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class LostLease:
    """A lease that was not renewed in time."""

    attempt: int
    worker: str
    lost_at: float
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class Condemned:
    """A job that lost too many leases."""

    job_id: str
    attempt: int
    lost: tuple[LostLease, ...]


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A submission whose jobs can not go on, because nobody reads its results."""

    submission: str
    jobs: int

    @property
    def job_ids(self) -> list[str]:
        """Ids of all of its jobs, also of those that have ended."""
        return job_ids(self.submission, self.jobs)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job is to be ended from outside."""

    job_id: str
    attempt: int | None
    """Only if it is at this attempt; None: whatever it is doing."""
    state: str
    data: bytes
    """A serialized ``ResultChunk``: its whole result."""


@dataclass(frozen=True, slots=True)
class QuarantinedJob:
    """A job that was quarantined."""

    job_id: str
    tenant: str
    spec: bytes
    lost: tuple[LostLease, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may hold, and its share; None: the default, or left as it is."""

    weight: float | None = None
    max_jobs: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant: its limits and what it holds."""

    tenant: str
    limits: Limits
    jobs: int
    """Queued and leased."""
    bytes: int
    """Of their specifications, and of results that nobody has read."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """State of a job."""

    job_id: str
    state: str
    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model that a worker serves."""

    name: str
    revision: str
    info: bytes
    """A serialized ``ModelInfo``."""

    @property
    def routes(self) -> tuple[str, ...]:
        """What jobs may ask for: the model, or exactly this revision of it."""
        return (self.name, f"{self.name}@{self.revision}") if self.revision else (self.name,)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A connected worker."""

    worker_id: str
    models: tuple[ModelRecord, ...]
    device: str
    version: str
    connected_at: float
    seen_at: float
    epoch: str = ""
    """Names its session: a later one has another."""
    leased: int = 0
    draining: bool = False
    """It was told to leave."""

    @property
    def routes(self) -> tuple[str, ...]:
        """The routes of all its models."""
        return tuple(route for model in self.models for route in model.routes)


@dataclass(frozen=True, slots=True)
class QueueRecord:
    """Depth of one model's queues, summed over tenants and classes."""

    model: str
    queued: int
    leased: int
