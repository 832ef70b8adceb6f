"""Which workers are connected, and which models have been served."""

import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.scripts import Scripts
from reltrace_scheduler.records import ModelRecord, WorkerRecord


class Registry:
    """Workers and models.

    A model stays known when its last worker leaves: jobs for it wait for the next one. That a
    worker was told to drain is kept until it leaves: one that was cut off is told again.

    Parameters
    ----------
    shards : sequence of Keys
        Of every shard: each leases to any worker.
    """

    def __init__(self, redis: Redis, shards: Sequence[Keys]) -> None:
        self._redis = redis
        self._shards = shards
        self._keys = shards[0]
        self._scripts = [Scripts(redis, keys) for keys in shards]

    async def add(self, worker: WorkerRecord) -> None:
        """Enter a worker and its models."""
        mapping: dict[Any, Any] = {
            "routes": "\n".join(worker.routes),
            "models": len(worker.models),
            **{
                f"{field}:{index}": getattr(model, field)
                for index, model in enumerate(worker.models)
                for field in ("name", "revision", "info")
            },
            "device": worker.device,
            "version": worker.version,
            "connected_at": repr(worker.connected_at),
        }
        async with self._redis.pipeline(transaction=False) as pipe:
            for model in worker.models:
                for route in model.routes:
                    pipe.hset(self._keys.models, route, model.info)
                    pipe.zadd(self._keys.serving(route), {worker.worker_id: worker.seen_at})
            pipe.hset(self._keys.worker(worker.worker_id), mapping=mapping)
            for keys in self._shards:
                pipe.hset(keys.worker(worker.worker_id), "epoch", worker.epoch)
            pipe.zadd(self._keys.workers, {worker.worker_id: worker.seen_at})
            await pipe.execute()

    async def forget_all(self) -> None:
        """Forget every worker; those that live connect and are entered again."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.delete(self._keys.workers)
            for route in await self.models():
                pipe.delete(self._keys.serving(route))
            await pipe.execute()

    async def seen(self, worker_id: str, routes: Sequence[str]) -> bool:
        """Note that a worker is alive; return whether it was told to drain."""
        now = time.time()
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zadd(self._keys.workers, {worker_id: now}, xx=True)
            for route in routes:
                pipe.zadd(self._keys.serving(route), {worker_id: now}, xx=True)
            pipe.hget(self._keys.worker(worker_id), "draining")
            row = await pipe.execute()
        return row[-1] is not None

    async def drain(self, worker_ids: Sequence[str]) -> list[str]:
        """Tell workers to drain, all or none of them; return those that are unknown."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id in worker_ids:
                pipe.exists(self._keys.worker(worker_id))
            known: list[Any] = await pipe.execute()
        unknown = [w for w, there in zip(worker_ids, known, strict=True) if not there]
        if unknown:
            return unknown
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id in worker_ids:
                pipe.hset(self._keys.worker(worker_id), "draining", 1)
            await pipe.execute()
        for worker_id in worker_ids:
            await self._redis.publish(self._keys.revoked(worker_id), "")
        return []

    async def forget(
        self, worker_id: str, *, epoch: str = "", unseen_since: float | None = None
    ) -> bool:
        """Forget a worker.

        Parameters
        ----------
        epoch : str
            Only if this is its session; empty: whichever.
        unseen_since : float or None
            Only if it was not seen at or after this Unix time; None: anyway.
        """
        conditions = (epoch, "" if unseen_since is None else repr(unseen_since))
        for keys, scripts in zip(self._shards, self._scripts, strict=True):
            reply = await scripts(
                "forget",
                [keys.queues, keys.workers, keys.worker(worker_id)],
                worker_id,
                *conditions,
            )
            if not reply:
                return False
            # The others know nothing that the conditions could be held against.
            conditions = ("", "")
        return True

    async def models(self) -> dict[str, bytes]:
        """Return the serialized ``ModelInfo`` of every model ever served, by route."""
        known: Any = await self._redis.hgetall(self._keys.models)
        return {route.decode(): info for route, info in known.items()}

    async def serving(self, routes: Sequence[str], *, seen_since: float) -> dict[str, int]:
        """Count the workers of each route seen at or after a Unix time; none: left out."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for route in routes:
                pipe.zcount(self._keys.serving(route), seen_since, "+inf")
            counts: list[Any] = await pipe.execute()
        return {r: int(count) for r, count in zip(routes, counts, strict=True) if count}

    async def unseen(self, *, since: float) -> list[str]:
        """Return the workers that were not seen since a Unix time."""
        found: Any = await self._redis.zrangebyscore(self._keys.workers, "-inf", f"({since!r}")
        return [worker_id.decode() for worker_id in found]

    async def workers(self, *, seen_since: float = 0.0) -> list[WorkerRecord]:
        """Return the workers seen at or after a Unix time."""
        seen: Any = await self._redis.zrangebyscore(
            self._keys.workers, seen_since, "+inf", withscores=True
        )
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id, _ in seen:
                pipe.hgetall(self._keys.worker(worker_id.decode()))
                for keys in self._shards:
                    pipe.scard(keys.held(worker_id.decode()))
            rows: list[Any] = await pipe.execute()
        width = 1 + len(self._shards)
        return [
            _worker(worker_id.decode(), float(score), *rows[index * width : (index + 1) * width])
            for index, (worker_id, score) in enumerate(seen)
            if rows[index * width]
        ]


def _worker(worker_id: str, seen_at: float, row: Any, *leased: Any) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        models=tuple(
            ModelRecord(
                row[f"name:{index}".encode()].decode(),
                row[f"revision:{index}".encode()].decode(),
                row[f"info:{index}".encode()],
            )
            for index in range(int(row[b"models"]))
        ),
        device=row[b"device"].decode(),
        version=row[b"version"].decode(),
        connected_at=float(row[b"connected_at"]),
        seen_at=seen_at,
        epoch=row[b"epoch"].decode(),
        leased=sum(map(int, leased)),
        draining=b"draining" in row,
    )
