"""Calls that ask a server for its state. `generate.py` makes their synchronous forms."""

from __future__ import annotations

from reltrace_proto.v1 import admin_pb2, trace_pb2

from reltrace.transport.connection import Connection
from reltrace.types import server_info
from reltrace.types.checks import check_job_ids, check_strings, portions, split_ids, whole_number
from reltrace.types.errors import invalid
from reltrace.types.server_info import QuarantinedJob, Requeued, Tenant, quarantined_job, tenant


class AsyncAdmin:
    """The operator's calls.

    A server that requires tokens answers only those of the role "operator"; other callers get
    `PermissionDenied`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def quarantined_jobs(self, limit: int = 100) -> list[QuarantinedJob]:
        """Return jobs that were quarantined, the latest first.

        Parameters
        ----------
        limit : int, default 100
            Most jobs to return.
        """
        answer = await self._connection.call(
            lambda server: server.admin.ListQuarantinedJobs,
            admin_pb2.ListQuarantinedJobsRequest(limit=whole_number(limit, "limit", 1, 2**32 - 1)),
        )
        return [quarantined_job(job) for job in answer.jobs]

    async def requeue(self, *job_ids: str) -> list[Requeued]:
        """Queue quarantined jobs again, as jobs of their tenant.

        Parameters
        ----------
        *job_ids : str
            As in `QuarantinedJob.id`.

        Raises
        ------
        NotFound
            If one of them is not a quarantined job; then none is queued.
        """
        check_strings(job_ids, "job_ids")
        answer = await self._connection.call(
            lambda server: server.admin.RequeueQuarantinedJobs,
            admin_pb2.RequeueQuarantinedJobsRequest(job_ids=job_ids),
        )
        return [Requeued(job.quarantined_job_id, job.job_id) for job in answer.jobs]

    async def workers(self) -> list[server_info.Worker]:
        """Return the workers that are connected."""
        answer = await self._connection.call(
            lambda server: server.admin.ListWorkers, admin_pb2.ListWorkersRequest()
        )
        return [server_info.worker(wire) for wire in answer.workers]

    async def drain(self, *worker_ids: str) -> None:
        """Drain workers: they return jobs that have not begun, finish the others, and end.

        Returns at once. A supervisor may start a new worker in the place of a drained one.

        Parameters
        ----------
        *worker_ids : str
            As in `Worker.id`.

        Raises
        ------
        NotFound
            If one of them is not connected; then none is drained.
        """
        check_strings(worker_ids, "worker_ids")
        await self._connection.call(
            lambda server: server.admin.DrainWorkers,
            admin_pb2.DrainWorkersRequest(worker_ids=worker_ids),
        )

    async def forget_models(self, *names: str) -> list[str]:
        """Forget models that no worker serves; jobs that wait for them fail with `ModelNotFound`.

        A server forgets models by itself that have had no worker for a week.

        Parameters
        ----------
        *names : str
            Models, with all their revisions, or revisions as NAME@REVISION.

        Returns
        -------
        list of str
            What was forgotten, as NAME and NAME@REVISION.

        Raises
        ------
        NotFound
            If one of them is not known; then none is forgotten.
        InvalidArgument
            If a worker serves one of them; then none is forgotten.
        """
        check_strings(names, "names")
        answer = await self._connection.call(
            lambda server: server.admin.ForgetModels, admin_pb2.ForgetModelsRequest(models=names)
        )
        return list(answer.routes)

    async def tenants(self) -> list[Tenant]:
        """Return every tenant that has jobs, unread results or limits."""
        answer = await self._connection.call(
            lambda server: server.admin.ListTenants, admin_pb2.ListTenantsRequest()
        )
        return [tenant(wire) for wire in answer.tenants]

    async def set_tenant(
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
            Its share of the workers relative to other tenants with queued jobs, 0.01 to 100.
        max_jobs : int, optional
            Bound on its jobs that have not ended.
        max_bytes : int, optional
            Bound on the bytes of these jobs and of unread results.

        Returns
        -------
        Tenant
            As it is now.

        Raises
        ------
        InvalidArgument
            If a value is not allowed.
        """
        try:
            request = admin_pb2.SetTenantRequest(
                tenant=name, weight=weight, max_jobs=max_jobs, max_bytes=max_bytes
            )
        except (TypeError, ValueError) as error:
            raise invalid("tenant", f"name, weight or a bound is not valid: {error}") from None
        answer = await self._connection.call(lambda server: server.admin.SetTenant, request)
        return tenant(answer.tenant)


class AsyncQueries:
    """The calls of `AsyncClient` about models, jobs and the server."""

    _connection: Connection

    @property
    def admin(self) -> AsyncAdmin:
        """The operator's calls: quarantined jobs, workers, tenants."""
        return AsyncAdmin(self._connection)

    async def models(self) -> list[server_info.Model]:
        """Return the models that can be traced, with the workers that serve them."""
        answer = await self._connection.call(
            lambda server: server.traces.ListModels, trace_pb2.ListModelsRequest()
        )
        return server_info.models(answer)

    async def status(self) -> server_info.Status:
        """Return the state of the server: queues, workers, ended jobs, store."""
        answer = await self._connection.call(
            lambda server: server.admin.GetStatus, admin_pb2.GetStatusRequest()
        )
        return server_info.status(answer)

    async def jobs(self, *job_ids: str) -> list[server_info.JobStatus]:
        """Return the state of jobs, in the order of their ids.

        Parameters
        ----------
        *job_ids : str
            Ids, such as `Trace.job_id` and `TraceError.job_id`.

        Raises
        ------
        InvalidArgument
            If one of them is not a job id.
        """
        check_job_ids(job_ids)
        found: list[server_info.JobStatus] = []
        for some in portions(job_ids):
            answer = await self._connection.call(
                lambda server: server.traces.GetJobs, trace_pb2.GetJobsRequest(job_ids=some)
            )
            found += server_info.jobs(answer)
        return found

    async def cancel(self, *ids: str) -> int:
        """Cancel jobs: queued ones never run, running ones are dropped before their next pass.

        Calls that wait for their results raise `Cancelled`. Jobs that have ended do not change.

        Parameters
        ----------
        *ids : str
            Ids of jobs ("1f2e-0"), or of submissions ("1f2e") for all of their jobs.

        Returns
        -------
        int
            Number of jobs that this call ended.

        Raises
        ------
        InvalidArgument
            If one of them is not such an id.
        NotFound
            If the server does not know a submission.
        """
        submissions, jobs = split_ids(ids)
        requests = [trace_pb2.CancelJobsRequest(submission_id=one) for one in submissions]
        requests += [trace_pb2.CancelJobsRequest(job_ids=some) for some in portions(jobs)]
        cancelled = 0
        for request in requests:
            answer = await self._connection.call(lambda server: server.traces.CancelJobs, request)
            cancelled += answer.cancelled
        return cancelled
