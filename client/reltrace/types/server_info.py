"""The state of a server: models, queues, workers, jobs, tenants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from reltrace_proto.v1 import admin_pb2, trace_pb2, types_pb2

from reltrace.types.arrays import scalar_name
from reltrace.types.errors import LostLease, lost_leases

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be traced.

    Attributes
    ----------
    name, revision, architecture : str
        `trace(model=...)` takes the name.
    layers, hidden_size, heads, intermediate_size, vocab_size : int
        Sizes of the model.
    context_length : int
        Longest prompt in tokens.
    parameters : int
        Number of its weights.
    dtype : str
        Number format of its weights and activations.
    sites, rules, reductions : tuple of str
        The sites, rules and reductions that its workers serve.
    workers : int
        How many workers have it loaded at present.
    """

    name: str
    revision: str
    architecture: str
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    parameters: int
    dtype: str
    sites: tuple[str, ...]
    rules: tuple[str, ...]
    reductions: tuple[str, ...]
    workers: int


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs of one model that have not ended.

    Attributes
    ----------
    model : str
        The model.
    queued, leased : int
        Number of jobs in the queue, and of jobs that a worker has leased.
    """

    model: str
    queued: int
    leased: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is connected.

    Attributes
    ----------
    id : str
        Stays the same when the worker connects again.
    model : str
        The model it has loaded.
    device, version : str
        Where it computes, and its software version.
    leased : int
        Jobs it holds.
    connected_at, seen_at : datetime.datetime or None
        When it connected, and when the server last heard from it, in UTC.
    further_models : tuple of str
        Other models that it has loaded, which it serves alternately.
    draining : bool
        Whether it takes no further jobs, and ends when it has finished those that it began.
    silent : float
        Seconds for which its pass has made no progress, if for 5 s or longer; else 0.
    """

    id: str
    model: str
    device: str
    version: str
    leased: int
    connected_at: datetime | None
    seen_at: datetime | None
    further_models: tuple[str, ...] = ()
    draining: bool = False
    silent: float = 0.0


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job, as the server has it.

    Attributes
    ----------
    id : str
        The job's id.
    state : {"queued", "leased", "succeeded", "failed", "cancelled", "quarantined"} or None
        None if the server does not know the job: its result was read or has expired, or it never
        existed.
    attempt : int
        How many times it was leased to a worker.
    worker : str
        The worker that leased it last.
    """

    id: str
    state: str | None
    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a server.

    Attributes
    ----------
    version : str
        Version of the scheduler.
    queues : tuple of Queue
        One per model.
    workers : tuple of Worker
        The connected workers.
    ended : mapping of str to int
        Number of jobs that ended since the store was created, by state.
    redis_version : str
        Version of the store, Redis.
    redis_memory_bytes : int
        Memory that it uses.
    tenants : tuple of Tenant
        Those that have unread results, most bytes first.
    """

    version: str
    queues: tuple[Queue, ...]
    workers: tuple[Worker, ...]
    ended: Mapping[str, int]
    redis_version: str
    redis_memory_bytes: int
    tenants: tuple[Tenant, ...]


@dataclass(frozen=True, slots=True)
class QuarantinedJob:
    """A job that was quarantined because it lost its worker too often.

    Attributes
    ----------
    id, tenant : str
        The job's id, and its tenant.
    model : str
        The model that it asked for.
    prompt : str or None
        Its text; None if token ids were submitted.
    input_ids : tuple of int
        Its token ids; empty if a text was submitted.
    lost_leases : tuple of LostLease
        The workers that it lost.
    """

    id: str
    tenant: str
    model: str
    prompt: str | None
    input_ids: tuple[int, ...]
    lost_leases: tuple[LostLease, ...]


@dataclass(frozen=True, slots=True)
class Requeued:
    """A quarantined job that was queued again.

    Attributes
    ----------
    quarantined_id : str
        Its id in quarantine.
    id : str
        Its new id.
    """

    quarantined_id: str
    id: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant, which owns jobs.

    Attributes
    ----------
    name : str
        Its name.
    weight : float or None
        Its share of the workers relative to other tenants with queued jobs; None: 1.
    max_jobs, max_bytes : int or None
        Bounds on `jobs` and `bytes`; None: the server's default.
    jobs, bytes : int
        Number of its jobs that have not ended, and bytes of these and of its unread results.
    unread_bytes : int
        Bytes of its results that nobody has read, which are part of `bytes`.
    """

    name: str
    weight: float | None
    max_jobs: int | None
    max_bytes: int | None
    jobs: int
    bytes: int
    unread_bytes: int


def model(wire: types_pb2.ModelInfo, workers: int) -> Model:
    """Translate a model."""
    return _translated(
        Model,
        wire,
        dtype=scalar_name(wire.dtype),
        sites=tuple(wire.sites),
        rules=tuple(wire.rules),
        reductions=tuple(wire.reductions),
        workers=workers,
    )


def models(wire: trace_pb2.ListModelsResponse) -> list[Model]:
    """Translate a list of models."""
    return [model(served.model, served.workers) for served in wire.models]


def jobs(wire: trace_pb2.GetJobsResponse) -> list[JobStatus]:
    """Translate the states of jobs."""
    return [
        JobStatus(job.job_id, _state_name(job.state), job.attempt, job.worker_id)
        for job in wire.jobs
    ]


def status(wire: admin_pb2.GetStatusResponse) -> Status:
    """Translate a server's state."""
    return _translated(
        Status,
        wire,
        queues=tuple(Queue(q.model, q.queued, q.leased) for q in wire.queues),
        workers=tuple(map(worker, wire.workers)),
        ended=dict(wire.ended),
        tenants=tuple(map(tenant, wire.tenants)),
    )


def worker(wire: admin_pb2.WorkerStatus) -> Worker:
    """Translate a worker."""
    return _translated(
        Worker,
        wire,
        id=wire.worker_id,
        model=wire.model.name,
        connected_at=_time(wire.connected_at),
        seen_at=_time(wire.seen_at),
        silent=wire.silent.ToTimedelta().total_seconds(),
        further_models=tuple(model.name for model in wire.further_models),
    )


def quarantined_job(wire: admin_pb2.QuarantinedJob) -> QuarantinedJob:
    """Translate a quarantined job."""
    return QuarantinedJob(
        id=wire.job_id,
        tenant=wire.tenant,
        model=wire.spec.model,
        prompt=wire.spec.prompt if wire.spec.HasField("prompt") else None,
        input_ids=tuple(wire.spec.input_ids.ids),
        lost_leases=lost_leases(wire.lost_leases),
    )


def tenant(wire: admin_pb2.Tenant) -> Tenant:
    """Translate a tenant."""
    return Tenant(
        name=wire.tenant,
        weight=wire.weight if wire.HasField("weight") else None,
        max_jobs=wire.max_jobs if wire.HasField("max_jobs") else None,
        max_bytes=wire.max_bytes if wire.HasField("max_bytes") else None,
        jobs=wire.jobs,
        bytes=wire.bytes,
        unread_bytes=wire.unread_bytes,
    )


def _translated(kind: type[T], wire: Message, **translated: object) -> T:
    """Return a dataclass whose other fields are those of a message, by the same names."""
    names = {field.name for field in fields(kind)} - translated.keys()  # type: ignore[arg-type]
    return kind(**translated, **{name: getattr(wire, name) for name in names})


def _state_name(state: types_pb2.JobState.ValueType) -> str | None:
    if not state:
        return None
    return types_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()


def _time(wire: Timestamp) -> datetime | None:
    return wire.ToDatetime(UTC) if wire.seconds else None
