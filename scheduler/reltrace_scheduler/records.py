"""What the queue takes and gives, free of Redis and protobuf."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from reltrace_scheduler.keys import QueueName, job_ids

_INLINE = 1 << 16
"""Bytes of an only chunk that is stored with its entry (`INLINE` of commit.lua)."""


class Priority(StrEnum):
    """Of a submission; also the class of the queues that its jobs start in."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class NewJob:
    route: str
    """Name of the model, or NAME@REVISION."""
    spec: bytes
    """A serialized ``JobSpec``."""
    timeout: float = 0.0
    """Seconds within which it must end; 0: none."""
    sent: bytes = b""
    """The specification as the client sent it, where that differs: for the digest of the jobs."""
    result_bytes: int = 0
    """Most bytes that its result takes in the store, as far as that is known."""


@dataclass(frozen=True, slots=True)
class Submission:
    id: str
    jobs: int
    deduplicated: bool = False
    """It was accepted before, under the same idempotency key."""

    @property
    def job_ids(self) -> list[str]:
        return job_ids(self.id, self.jobs)


@dataclass(frozen=True, slots=True)
class Progress:
    """How many jobs of a submission have ended."""

    tenant: str
    jobs: int
    ended: int


class Lease(NamedTuple):
    """A lease of the worker whose session it is; several times hashed for every job."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class LeasedJob:
    job_id: str
    attempt: int
    spec: bytes
    queued_for: float
    """Seconds between its acceptance and this lease."""
    queue: QueueName


@dataclass(frozen=True, slots=True)
class Leased:
    """The reply to a worker that asked for jobs of a route."""

    jobs: tuple[LeasedJob, ...]
    empty: bool
    """No job is queued."""
    isolated: bool
    """Jobs are queued that are leased only to a worker that holds nothing else."""


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk of a result, as a worker sends it."""

    lease: Lease
    number: int
    end: str
    """State in which the job ends with this chunk; empty: further ones follow."""
    data: bytes
    """A serialized ``ResultChunk``."""
    too_large: bytes = b""
    """A serialized ``ResultChunk`` that ends the job if this one makes its result too large."""

    @property
    def is_inline(self) -> bool:
        """Whether it is a whole result, so small that it is taken whatever the bounds are."""
        return self.number == 1 and bool(self.end) and len(self.data) <= _INLINE


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of a result, as a client reads it."""

    entry: int
    """The number of its result in the submission."""
    data: bytes
    """A serialized ``ResultChunk``."""


@dataclass(frozen=True, slots=True)
class StoredDraft:
    """A further part of a text that is being generated, as a client reads it."""

    position: str
    """Where to read on."""
    data: bytes
    """A serialized ``Draft``."""


@dataclass(frozen=True, slots=True)
class LostLease:
    """A lease that was not renewed in time."""

    attempt: int
    worker: str
    lost_at: float
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class QuarantineCandidate:
    """A job that has lost too many leases, before it is quarantined."""

    job_id: str
    attempt: int
    lost: tuple[LostLease, ...]


@dataclass(frozen=True, slots=True)
class QuarantinedJob:
    job_id: str
    tenant: str
    spec: bytes
    lost: tuple[LostLease, ...]
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True, slots=True)
class TerminalResult:
    """The result of a job that the scheduler ends."""

    job_id: str
    attempt: int | None
    """The job is ended only if it is at this attempt; None: at any."""
    state: str
    data: bytes
    """A serialized ``ResultChunk``: its whole result."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    job_id: str
    state: str
    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The share and the bounds of a tenant; None: the default, or unchanged."""

    weight: float | None = None
    max_jobs: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class TenantRecord:
    tenant: str
    limits: Limits
    jobs: int
    """How many are queued or leased."""
    bytes: int
    """Size of their specifications and of unread results."""
    unread: int
    """Size of the latter alone."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A connected worker; times are Unix times in seconds, by Redis' clock."""

    worker_id: str
    hello: bytes
    """A serialized ``Hello``: its models, device and version."""
    routes: tuple[str, ...]
    """What jobs may ask for: its models, by name and by NAME@REVISION."""
    epoch: str
    """Names its session: a later one has another."""
    connected_at: float = 0.0
    seen_at: float = 0.0
    leased: int = 0
    draining: bool = False
    silent: float = 0.0
    """Seconds for which what it computes has stood still, if they are many."""
