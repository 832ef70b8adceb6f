"""What operators query: quarantined jobs and tenants."""

from __future__ import annotations

from dataclasses import dataclass

from reltrace_proto.v1 import admin_pb2

from reltrace.types.errors import LostLease, lost_leases


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
    """A quarantined job that is queued once more.

    Attributes
    ----------
    quarantined_id : str
        The id that it had.
    id : str
        Its new id.
    """

    quarantined_id: str
    id: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant, to which jobs belong.

    Attributes
    ----------
    name : str
        The tenant.
    weight : float or None
        Its share of the workers in proportion to other tenants with queued jobs; None: 1.
    max_jobs, max_bytes : int or None
        Bounds on `jobs` and `bytes`; None: the server's default.
    jobs, bytes : int
        Its jobs that have not ended, and the bytes of these and of unread results.
    """

    name: str
    weight: float | None
    max_jobs: int | None
    max_bytes: int | None
    jobs: int
    bytes: int


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
    )
