"""What operators ask of a server: `client.admin`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from reltrace_proto.v1 import admin_pb2

from reltrace.client.loop_thread import LoopThread
from reltrace.transport.connection import Connection, Deadline
from reltrace.types.checks import whole_number
from reltrace.types.errors import LostLease, RpcStatus, invalid, lost_leases
from reltrace.types.server_info import Worker, worker

_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class QuarantinedJob:
    """A job that was quarantined: it lost its worker too often.

    Attributes
    ----------
    id, tenant : str
        The job, and whose it is.
    model : str
        That it asked for.
    prompt : str or None
        Its text; None if it came as token ids.
    input_ids : tuple of int
        Its token ids; empty if it came as text.
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
        What it was called.
    id : str
        What it is called now.
    """

    quarantined_id: str
    id: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever jobs belong to.

    Attributes
    ----------
    name : str
        The tenant.
    weight : float or None
        Its share of the workers, against other tenants that wait; None: 1.
    max_jobs, max_bytes : int or None
        Bounds on its jobs, and on the bytes of these and of results that nobody has read; None:
        the server's default.
    jobs, bytes : int
        What it holds at present.
    """

    name: str
    weight: float | None
    max_jobs: int | None
    max_bytes: int | None
    jobs: int
    bytes: int


class AsyncAdmin:
    """The operator's calls of `AsyncClient`; see `Admin`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def quarantined_jobs(self, limit: int = 100) -> list[QuarantinedJob]:
        """Return quarantined jobs. See `Admin.quarantined_jobs`."""
        request = admin_pb2.ListQuarantinedJobsRequest(
            limit=whole_number(limit, "limit", 1, 2**32 - 1)
        )
        answer = await self._call(lambda server: server.admin.ListQuarantinedJobs, request)
        return [
            QuarantinedJob(
                id=job.job_id,
                tenant=job.tenant,
                model=job.spec.model,
                prompt=job.spec.prompt if job.spec.HasField("prompt") else None,
                input_ids=tuple(job.spec.input_ids.ids),
                lost_leases=lost_leases(job.lost_leases),
            )
            for job in answer.jobs
        ]

    async def requeue(self, *job_ids: str) -> list[Requeued]:
        """Queue quarantined jobs once more. See `Admin.requeue`."""
        answer = await self._call(
            lambda server: server.admin.RequeueQuarantinedJobs,
            admin_pb2.RequeueQuarantinedJobsRequest(job_ids=_texts(job_ids, "job_ids")),
        )
        return [Requeued(job.quarantined_job_id, job.job_id) for job in answer.jobs]

    async def workers(self) -> list[Worker]:
        """Return the connected workers. See `Admin.workers`."""
        answer = await self._call(
            lambda server: server.admin.ListWorkers, admin_pb2.ListWorkersRequest()
        )
        return [worker(wire) for wire in answer.workers]

    async def drain(self, *worker_ids: str) -> None:
        """Have workers leave. See `Admin.drain`."""
        await self._call(
            lambda server: server.admin.DrainWorkers,
            admin_pb2.DrainWorkersRequest(worker_ids=_texts(worker_ids, "worker_ids")),
        )

    async def tenants(self) -> list[Tenant]:
        """Return all tenants. See `Admin.tenants`."""
        answer = await self._call(
            lambda server: server.admin.ListTenants, admin_pb2.ListTenantsRequest()
        )
        return [_tenant(tenant) for tenant in answer.tenants]

    async def set_tenant(
        self,
        name: str,
        *,
        weight: float | None = None,
        max_jobs: int | None = None,
        max_bytes: int | None = None,
    ) -> Tenant:
        """Set a tenant's share and bounds. See `Admin.set_tenant`."""
        try:
            request = admin_pb2.SetTenantRequest(
                tenant=name, weight=weight, max_jobs=max_jobs, max_bytes=max_bytes
            )
        except (TypeError, ValueError) as error:
            raise invalid(
                "tenant", f"its name, share or bounds are no such values: {error}"
            ) from None
        answer = await self._call(lambda server: server.admin.SetTenant, request)
        return _tenant(answer.tenant)

    async def _call(self, method: Any, request: Message) -> Any:
        answer = await self._connection.call(method, request, Deadline(_TIMEOUT))
        assert not isinstance(answer, RpcStatus)
        return answer


class Admin:
    """The operator's calls of `Client`.

    A server that asks for tokens answers them for the role "operator" only; anybody else gets
    `PermissionDenied`. All of them raise `Unavailable` if no server can be reached.
    """

    def __init__(self, admin: AsyncAdmin, loop: LoopThread) -> None:
        self._admin = admin
        self._loop = loop

    def quarantined_jobs(self, limit: int = 100) -> list[QuarantinedJob]:
        """Return jobs that were quarantined, the latest first.

        Parameters
        ----------
        limit : int, default 100
            At most so many.
        """
        return self._loop.run(self._admin.quarantined_jobs(limit))

    def requeue(self, *job_ids: str) -> list[Requeued]:
        """Queue quarantined jobs once more, as jobs of their tenant.

        Parameters
        ----------
        *job_ids : str
            As in `QuarantinedJob.id`.

        Raises
        ------
        NotFound
            If one of them is no quarantined job; then none is queued.
        """
        return self._loop.run(self._admin.requeue(*job_ids))

    def workers(self) -> list[Worker]:
        """Return the workers that are connected."""
        return self._loop.run(self._admin.workers())

    def drain(self, *worker_ids: str) -> None:
        """Have workers leave: they hand back what they have not begun, end what they have, and end.

        Returns at once. A supervisor may start such a worker again, as a new one.

        Parameters
        ----------
        *worker_ids : str
            As in `Worker.id`.

        Raises
        ------
        NotFound
            If one of them is not connected; then none is told.
        """
        self._loop.run(self._admin.drain(*worker_ids))

    def tenants(self) -> list[Tenant]:
        """Return every tenant that has been seen or set."""
        return self._loop.run(self._admin.tenants())

    def set_tenant(
        self,
        name: str,
        *,
        weight: float | None = None,
        max_jobs: int | None = None,
        max_bytes: int | None = None,
    ) -> Tenant:
        """Set a tenant's share and bounds; what is left out stays as it is.

        Parameters
        ----------
        name : str
            The tenant.
        weight : float, optional
            Its share of the workers against other tenants that wait, 0.01 to 100.
        max_jobs : int, optional
            Bound on its jobs that have not ended.
        max_bytes : int, optional
            Bound on the bytes of these, and of results that nobody has read.

        Returns
        -------
        Tenant
            As it is now.

        Raises
        ------
        InvalidArgument
            If a value is not allowed.
        """
        return self._loop.run(
            self._admin.set_tenant(name, weight=weight, max_jobs=max_jobs, max_bytes=max_bytes)
        )


def _texts(ids: Sequence[str], argument: str) -> Sequence[str]:
    for index, one in enumerate(ids):
        if not isinstance(one, str):
            raise invalid(f"{argument}[{index}]", f"must be str, not {type(one).__name__}")
    return ids


def _tenant(wire: admin_pb2.Tenant) -> Tenant:
    return Tenant(
        name=wire.tenant,
        weight=wire.weight if wire.HasField("weight") else None,
        max_jobs=wire.max_jobs if wire.HasField("max_jobs") else None,
        max_bytes=wire.max_bytes if wire.HasField("max_bytes") else None,
        jobs=wire.jobs,
        bytes=wire.bytes,
    )
