"""Which workers are connected, and which models have been served."""

import time
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.store.keys import Keys
from reltrace_scheduler.store.records import WorkerRecord
from reltrace_scheduler.store.scripts import Scripts


class Registry:
    """Workers and models.

    A model stays known when its last worker leaves: jobs for it wait for the next one.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys)

    async def add(self, worker: WorkerRecord) -> None:
        """Enter a worker and its model."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._keys.models, worker.model, worker.info)
            pipe.hset(
                self._keys.worker(worker.worker_id),
                mapping={
                    "model": worker.model,
                    "info": worker.info,
                    "device": worker.device,
                    "version": worker.version,
                    "connected_at": repr(worker.connected_at),
                    "epoch": worker.epoch,
                },
            )
            pipe.zadd(self._keys.workers, {worker.worker_id: worker.seen_at})
            await pipe.execute()

    async def forget_all(self) -> None:
        """Forget every worker; those that live connect and are entered again."""
        await self._redis.delete(self._keys.workers)

    async def seen(self, worker_id: str) -> None:
        """Note that a worker is alive."""
        await self._redis.zadd(self._keys.workers, {worker_id: time.time()}, xx=True)

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
        reply = await self._scripts(
            "forget",
            [self._keys.queues, self._keys.workers, self._keys.worker(worker_id)],
            worker_id,
            epoch,
            "" if unseen_since is None else repr(unseen_since),
        )
        return bool(reply)

    async def models(self) -> dict[str, bytes]:
        """Return the serialized ``ModelInfo`` of every model ever served, by name."""
        known: Any = await self._redis.hgetall(self._keys.models)
        return {name.decode(): info for name, info in known.items()}

    async def workers(self, *, seen_since: float = 0.0) -> list[WorkerRecord]:
        """Return the workers seen at or after a Unix time."""
        seen: Any = await self._redis.zrangebyscore(
            self._keys.workers, seen_since, "+inf", withscores=True
        )
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id, _ in seen:
                pipe.hgetall(self._keys.worker(worker_id.decode()))
                pipe.scard(self._keys.held(worker_id.decode()))
            rows = await pipe.execute()
        return [
            WorkerRecord(
                worker_id=worker_id.decode(),
                model=row[b"model"].decode(),
                info=row[b"info"],
                device=row[b"device"].decode(),
                version=row[b"version"].decode(),
                connected_at=float(row[b"connected_at"]),
                seen_at=float(score),
                epoch=row[b"epoch"].decode(),
                leased=int(leased),
            )
            for (worker_id, score), row, leased in zip(seen, rows[::2], rows[1::2], strict=True)
            if row
        ]
