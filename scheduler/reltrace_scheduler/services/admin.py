"""AdminService: what operators call."""

import re
import time
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, types_pb2

from reltrace_scheduler import __version__
from reltrace_scheduler.auth.identity import TENANT_NAME, TENANT_RULE
from reltrace_scheduler.config import Settings
from reltrace_scheduler.endings import wire_losses
from reltrace_scheduler.errors import InvalidRequestError, UnknownJobError, Violation
from reltrace_scheduler.store.queue import Queue
from reltrace_scheduler.store.records import Limits, NewJob, QueueRecord, TenantRecord
from reltrace_scheduler.store.registry import Registry
from reltrace_scheduler.store.tenants import Tenants
from reltrace_scheduler.store.upkeep import Upkeep
from reltrace_scheduler.validation import check_job_ids

Context = grpc.aio.ServicerContext[Any, Any]


_DEAD_SHOWN = 100
_LEAST_WEIGHT, _MOST_WEIGHT = 0.01, 100.0


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Shows the cluster, and lets operators act on it."""

    def __init__(
        self,
        redis: Redis,
        queue: Queue,
        upkeep: Upkeep,
        tenants: Tenants,
        registry: Registry,
        settings: Settings,
    ) -> None:
        self._redis = redis
        self._queue = queue
        self._upkeep = upkeep
        self._tenants = tenants
        self._registry = registry
        self._settings = settings

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        info: Mapping[str, Any] = await self._redis.info()
        models = await self._registry.models()
        depths = await self._queue.depths()
        queues = [depths.get(model, QueueRecord(model, 0, 0)) for model in sorted(models)]
        # One that missed this long holds no lease any more.
        alive = await self._registry.workers(seen_since=time.time() - self._settings.lease)
        return admin_pb2.GetStatusResponse(
            version=__version__,
            queues=[
                admin_pb2.QueueStatus(model=q.model, queued=q.queued, leased=q.leased)
                for q in queues
            ],
            workers=[
                admin_pb2.WorkerStatus(
                    worker_id=worker.worker_id,
                    model=types_pb2.ModelInfo.FromString(worker.info),
                    device=worker.device,
                    version=worker.version,
                    leased=worker.leased,
                    connected_at=_timestamp(worker.connected_at),
                    seen_at=_timestamp(worker.seen_at),
                )
                for worker in alive
            ],
            ended=await self._queue.ended(),
            redis_version=str(info["redis_version"]),
            redis_memory_bytes=int(info["used_memory"]),
        )

    async def ListDeadJobs(  # noqa: N802
        self, request: admin_pb2.ListDeadJobsRequest, context: Context
    ) -> admin_pb2.ListDeadJobsResponse:
        jobs = await self._upkeep.dead(request.limit or _DEAD_SHOWN)
        return admin_pb2.ListDeadJobsResponse(
            jobs=[
                admin_pb2.DeadJob(
                    job_id=job.job_id,
                    tenant=job.tenant,
                    spec=types_pb2.JobSpec.FromString(job.spec),
                    lost_leases=wire_losses(job.lost),
                )
                for job in jobs
            ]
        )

    async def RequeueDeadJobs(  # noqa: N802
        self, request: admin_pb2.RequeueDeadJobsRequest, context: Context
    ) -> admin_pb2.RequeueDeadJobsResponse:
        check_job_ids(request.job_ids)
        found = await self._upkeep.dead_jobs(request.job_ids)
        unknown = [
            Violation(f"job_ids[{index}]", f"no dead job {request.job_ids[index]!r}")
            for index, job in enumerate(found)
            if job is None
        ]
        if unknown:
            raise UnknownJobError(*unknown)
        response = admin_pb2.RequeueDeadJobsResponse()
        for job in found:
            assert job is not None
            spec = types_pb2.JobSpec.FromString(job.spec)
            # The key makes a second call, or one that was cut off, find the first one's job.
            submission = await self._queue.submit(
                [NewJob(spec.model, job.spec)],
                tenant=job.tenant,
                idempotency_key=f"dead:{job.job_id}",
            )
            await self._upkeep.forget_dead(job.job_id)
            response.jobs.add(
                dead_job_id=job.job_id,
                submission_id=submission.id,
                job_id=submission.job_ids[0],
            )
        return response

    async def ListTenants(  # noqa: N802
        self, request: admin_pb2.ListTenantsRequest, context: Context
    ) -> admin_pb2.ListTenantsResponse:
        return admin_pb2.ListTenantsResponse(
            tenants=[_tenant(tenant) for tenant in await self._tenants.all()]
        )

    async def SetTenant(  # noqa: N802
        self, request: admin_pb2.SetTenantRequest, context: Context
    ) -> admin_pb2.SetTenantResponse:
        if not re.fullmatch(TENANT_NAME, request.tenant):
            raise InvalidRequestError(Violation("tenant", TENANT_RULE))
        if request.HasField("weight") and not _LEAST_WEIGHT <= request.weight <= _MOST_WEIGHT:
            raise InvalidRequestError(
                Violation("weight", f"must be {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}")
            )
        limits = Limits(
            weight=request.weight if request.HasField("weight") else None,
            max_jobs=request.max_jobs if request.HasField("max_jobs") else None,
            max_bytes=request.max_bytes if request.HasField("max_bytes") else None,
        )
        return admin_pb2.SetTenantResponse(
            tenant=_tenant(await self._tenants.set(request.tenant, limits))
        )


def _tenant(record: TenantRecord) -> admin_pb2.Tenant:
    return admin_pb2.Tenant(
        tenant=record.tenant,
        weight=record.limits.weight,
        max_jobs=record.limits.max_jobs,
        max_bytes=record.limits.max_bytes,
        jobs=record.jobs,
        bytes=record.bytes,
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
