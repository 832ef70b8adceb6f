"""AdminService: what operators call."""

import time
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, types_pb2

from reltrace_scheduler import __version__
from reltrace_scheduler.config import Settings
from reltrace_scheduler.store.queue import Queue
from reltrace_scheduler.store.records import QueueRecord
from reltrace_scheduler.store.registry import Registry

Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Shows the cluster."""

    def __init__(self, redis: Redis, queue: Queue, registry: Registry, settings: Settings) -> None:
        self._redis = redis
        self._queue = queue
        self._registry = registry
        self._settings = settings

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        info: Mapping[str, Any] = await self._redis.info()
        models = await self._registry.models()
        queues = {model: await self._queue.depth(model) for model in sorted(models)}
        # One that missed this long holds no lease any more.
        alive = await self._registry.workers(seen_since=time.time() - self._settings.lease)
        return admin_pb2.GetStatusResponse(
            version=__version__,
            queues=[
                admin_pb2.QueueStatus(model=q.model, queued=q.queued, leased=q.leased)
                for q in queues.values()
            ],
            workers=[
                admin_pb2.WorkerStatus(
                    worker_id=worker.worker_id,
                    model=types_pb2.ModelInfo.FromString(worker.info),
                    device=worker.device,
                    version=worker.version,
                    leased=_leased_by(queues, worker.model, worker.worker_id),
                    connected_at=_timestamp(worker.connected_at),
                    seen_at=_timestamp(worker.seen_at),
                )
                for worker in alive
            ],
            ended=await self._queue.ended(),
            redis_version=str(info["redis_version"]),
            redis_memory_bytes=int(info["used_memory"]),
        )


def _leased_by(queues: Mapping[str, QueueRecord], model: str, worker_id: str) -> int:
    return queues[model].leased_by.get(worker_id, 0) if model in queues else 0


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
