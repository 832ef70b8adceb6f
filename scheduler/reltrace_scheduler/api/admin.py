"""AdminService: what operators call."""

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, types_pb2, worker_pb2

from reltrace_scheduler import __version__
from reltrace_scheduler.api.forgetting import Forgetting
from reltrace_scheduler.api.terminal_results import lost_leases
from reltrace_scheduler.api.validation import check_job_ids
from reltrace_scheduler.auth.identity import TENANT_NAME, TENANT_RULE
from reltrace_scheduler.errors import NotFoundError, Violation, invalid
from reltrace_scheduler.queue.gauges import read_cluster
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Limits, NewJob, TenantRecord, WorkerRecord

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()

_QUARANTINED_SHOWN = 100
_MAX_DRAINED = 1000
_MAX_FORGOTTEN = 1000
_MIN_WEIGHT, _MAX_WEIGHT = 0.01, 100.0


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, store: Store, redis_version: str, forgetting: Forgetting) -> None:
        self._store = store
        self._forgetting = forgetting
        self._redis_version = redis_version

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        cluster = await read_cluster(self._store)
        unread = [tenant for tenant in await self._store.tenants.all() if tenant.unread]
        # A route that names a revision is shown only where it has jobs.
        queues = {model: admin_pb2.QueueStatus(model=model) for model in cluster.workers}
        for gauge in cluster.queues:
            queue = queues.setdefault(gauge.model, admin_pb2.QueueStatus(model=gauge.model))
            queue.queued += gauge.queued
            queue.leased += gauge.leased
        return admin_pb2.GetStatusResponse(
            version=__version__,
            queues=[queue for _, queue in sorted(queues.items())],
            workers=await self._workers(),
            ended=cluster.ended,
            redis_version=self._redis_version,
            redis_memory_bytes=cluster.memory,
            tenants=map(_tenant, sorted(unread, key=lambda one: one.unread, reverse=True)),
        )

    async def _workers(self) -> list[admin_pb2.WorkerStatus]:
        return [_worker(worker) for worker in await self._store.registry.workers()]

    async def ListWorkers(  # noqa: N802
        self, request: admin_pb2.ListWorkersRequest, context: Context
    ) -> admin_pb2.ListWorkersResponse:
        return admin_pb2.ListWorkersResponse(workers=await self._workers())

    async def DrainWorkers(  # noqa: N802
        self, request: admin_pb2.DrainWorkersRequest, context: Context
    ) -> admin_pb2.DrainWorkersResponse:
        if not 0 < len(request.worker_ids) <= _MAX_DRAINED:
            raise invalid("worker_ids", f"must name 1 to {_MAX_DRAINED} workers")
        unknown = await self._store.registry.drain(request.worker_ids)
        _refuse_unknown(
            Violation(f"worker_ids[{index}]", f"no worker {worker_id!r} is connected")
            for index, worker_id in enumerate(request.worker_ids)
            if worker_id in unknown
        )
        log.info("workers.drained", workers=list(request.worker_ids))
        return admin_pb2.DrainWorkersResponse()

    async def ForgetModels(  # noqa: N802
        self, request: admin_pb2.ForgetModelsRequest, context: Context
    ) -> admin_pb2.ForgetModelsResponse:
        if not 0 < len(request.models) <= _MAX_FORGOTTEN:
            raise invalid("models", f"must name 1 to {_MAX_FORGOTTEN} models")
        models = await self._forgetting.models()
        _refuse_unknown(
            Violation(f"models[{index}]", f"no model {name!r} is known")
            for index, name in enumerate(request.models)
            if name not in models
        )
        if served := [name for name in request.models if models[name]]:
            named = ", ".join(f"{name!r} ({models[name]} workers)" for name in served)
            raise invalid("models", f"are served: {named}; drain their workers first")
        forgotten = await self._forgetting.forget_models(*request.models)
        return admin_pb2.ForgetModelsResponse(routes=sorted(forgotten))

    async def ListQuarantinedJobs(  # noqa: N802
        self, request: admin_pb2.ListQuarantinedJobsRequest, context: Context
    ) -> admin_pb2.ListQuarantinedJobsResponse:
        jobs = await self._store.quarantine.latest(request.limit or _QUARANTINED_SHOWN)
        return admin_pb2.ListQuarantinedJobsResponse(
            jobs=[
                admin_pb2.QuarantinedJob(
                    job_id=job.job_id,
                    tenant=job.tenant,
                    spec=types_pb2.JobSpec.FromString(job.spec),
                    lost_leases=lost_leases(job.lost),
                )
                for job in jobs
            ]
        )

    async def RequeueQuarantinedJobs(  # noqa: N802
        self, request: admin_pb2.RequeueQuarantinedJobsRequest, context: Context
    ) -> admin_pb2.RequeueQuarantinedJobsResponse:
        check_job_ids(request.job_ids)
        found = await self._store.quarantine.get(request.job_ids)
        _refuse_unknown(
            Violation(f"job_ids[{index}]", f"no quarantined job {request.job_ids[index]!r}")
            for index, job in enumerate(found)
            if job is None
        )
        response = admin_pb2.RequeueQuarantinedJobsResponse()
        for job in found:
            assert job is not None
            spec = types_pb2.JobSpec.FromString(job.spec)
            # The key makes a second call, or one that was cut off, find the first one's job.
            timeout = spec.timeout.ToTimedelta().total_seconds()
            most = self._store.bounds.max_result_bytes
            submission = await self._store.queue.submit(
                [NewJob(spec.model, job.spec, timeout, result_bytes=most)],
                tenant=job.tenant,
                priority=job.priority,
                idempotency_key=f"quarantined:{job.job_id}",
            )
            await self._store.quarantine.forget(job.job_id)
            response.jobs.add(
                quarantined_job_id=job.job_id,
                submission_id=submission.id,
                job_id=submission.job_ids[0],
            )
        return response

    async def ListTenants(  # noqa: N802
        self, request: admin_pb2.ListTenantsRequest, context: Context
    ) -> admin_pb2.ListTenantsResponse:
        return admin_pb2.ListTenantsResponse(
            tenants=[_tenant(tenant) for tenant in await self._store.tenants.all()]
        )

    async def SetTenant(  # noqa: N802
        self, request: admin_pb2.SetTenantRequest, context: Context
    ) -> admin_pb2.SetTenantResponse:
        if not re.fullmatch(TENANT_NAME, request.tenant):
            raise invalid("tenant", TENANT_RULE)
        if request.HasField("weight") and not _MIN_WEIGHT <= request.weight <= _MAX_WEIGHT:
            raise invalid("weight", f"must be {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}")
        limits = Limits(
            weight=request.weight if request.HasField("weight") else None,
            max_jobs=request.max_jobs if request.HasField("max_jobs") else None,
            max_bytes=request.max_bytes if request.HasField("max_bytes") else None,
        )
        return admin_pb2.SetTenantResponse(
            tenant=_tenant(await self._store.tenants.set(request.tenant, limits))
        )


def _refuse_unknown(violations: Iterable[Violation]) -> None:
    if unknown := tuple(violations):
        raise NotFoundError(*unknown)


def _worker(record: WorkerRecord) -> admin_pb2.WorkerStatus:
    hello = worker_pb2.Hello.FromString(record.hello)
    status = admin_pb2.WorkerStatus(
        worker_id=record.worker_id,
        model=hello.model,
        further_models=hello.further_models,
        device=hello.device,
        version=hello.version,
        leased=record.leased,
        connected_at=_timestamp(record.connected_at),
        seen_at=_timestamp(record.seen_at),
        draining=record.draining,
    )
    if record.silent:
        status.silent.FromTimedelta(timedelta(seconds=record.silent))
    return status


def _tenant(record: TenantRecord) -> admin_pb2.Tenant:
    return admin_pb2.Tenant(
        tenant=record.tenant,
        weight=record.limits.weight,
        max_jobs=record.limits.max_jobs,
        max_bytes=record.limits.max_bytes,
        jobs=record.jobs,
        bytes=record.bytes,
        unread_bytes=record.unread,
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
