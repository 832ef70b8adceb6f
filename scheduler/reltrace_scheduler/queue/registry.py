"""Which workers are connected, and which models they serve or served."""

from collections.abc import Mapping, Sequence
from typing import Any

from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.shards import Shards, milliseconds
from reltrace_scheduler.records import WorkerRecord

_UNSEEN = 10
"""Lease times after which a worker is forgotten: it may come back under its name before."""


class Registry:
    """Workers and models, in the first shard; each shard knows the workers' sessions.

    A model stays known when its last worker leaves, until it is forgotten: jobs for it wait for the
    next one. That a worker was told to drain is kept until it leaves, so that it is told again
    after a lost connection.
    """

    def __init__(self, shards: Shards, settings: Settings) -> None:
        self._shards = shards
        self._redis = shards.redis
        self._first = shards.all[0]
        self._key = self._first.key
        self._lease = settings.lease

    async def add(self, worker: WorkerRecord, models: Mapping[str, bytes]) -> None:
        """Enter a worker, and the serialized ``ModelInfo`` of its models by route."""
        known = (
            worker.hello,
            *(part for route in worker.routes for part in (route, models[route])),
        )
        for shard in self._shards.all:
            about = known if shard is self._first else ()
            keys = [shard.key("worker", worker.worker_id)]
            await shard.run("enter", keys, worker.worker_id, worker.epoch, *about)

    async def forget_all(self) -> None:
        """Forget every worker; those that are alive connect and are entered again."""
        routes = await self.models()
        await self._redis.delete(
            self._key("workers"), *(self._key("serving", route) for route in routes)
        )

    async def seen(self, worker_id: str, routes: Sequence[str], silent: float = 0.0) -> bool:
        """Note that a worker is alive, and whether it has stood still for some seconds.

        Returns whether it was told to drain.
        """
        keys = [self._key("worker", worker_id)]
        return bool(await self._first.run("seen", keys, worker_id, silent or 0, *routes))

    async def drain(self, worker_ids: Sequence[str]) -> list[str]:
        """Tell workers to drain, all or none of them; return those that are unknown."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id in worker_ids:
                pipe.exists(self._key("worker", worker_id))
            known: list[Any] = await pipe.execute()
        unknown = [w for w, there in zip(worker_ids, known, strict=True) if not there]
        if not unknown:
            async with self._redis.pipeline(transaction=False) as pipe:
                for worker_id in worker_ids:
                    pipe.hset(self._key("worker", worker_id), "draining", 1)
                await pipe.execute()
            for worker_id in worker_ids:
                await self._redis.publish(self._key("revoked", worker_id), "")
        return unknown

    async def forget(self, worker_id: str, *, epoch: str = "", unseen: bool = False) -> None:
        """Forget a worker, if this is its session, and, if so asked, it is still `unseen`."""
        conditions = (epoch, milliseconds(_UNSEEN * self._lease) if unseen else "")
        for shard in self._shards.all:
            keys = [shard.key("worker", worker_id)]
            if not await shard.run("forget", keys, worker_id, *conditions):
                return
            # Only the first shard knows when the worker was seen.
            conditions = ("", "")

    async def models(self) -> dict[str, bytes]:
        """Return the serialized ``ModelInfo`` of every known model, by route."""
        known: Any = await self._redis.hgetall(self._key("models"))
        return {route.decode(): info for route, info in known.items()}

    async def forget_models(self, names: Sequence[str] = (), *, ttl: float) -> list[str]:
        """Forget routes that no worker has served for `ttl` seconds, and those that are named.

        Returns them. The name of a model stands for all its revisions. What a worker serves that
        is alive stays known.
        """
        found = await self._shards.all[0].run(
            "forget_models", [], milliseconds(ttl), milliseconds(self._lease), *names
        )
        return [route.decode() for route in found]

    async def serving(self, routes: Sequence[str]) -> dict[str, int]:
        """Count the workers of each route that are alive; none: left out."""
        since = await self._since(1)
        async with self._redis.pipeline(transaction=False) as pipe:
            for route in routes:
                pipe.zcount(self._key("serving", route), since, "+inf")
            counts: list[Any] = await pipe.execute()
        return {r: int(count) for r, count in zip(routes, counts, strict=True) if count}

    async def unseen(self) -> list[str]:
        """Return the workers that were not seen for long."""
        since = await self._since(_UNSEEN)
        found: Any = await self._redis.zrangebyscore(self._key("workers"), "-inf", f"({since!r}")
        return [worker_id.decode() for worker_id in found]

    async def _since(self, leases: int) -> float:
        """Return the Unix time some lease times ago by Redis' clock, which decides who is alive."""
        return await self._first.now() / 1000 - leases * self._lease

    async def workers(self) -> list[WorkerRecord]:
        """Return the workers that are alive: one that missed a lease time holds no lease more."""
        seen: Any = await self._redis.zrangebyscore(
            self._key("workers"), await self._since(1), "+inf", withscores=True
        )
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id, _ in seen:
                pipe.hgetall(self._key("worker", worker_id.decode()))
                for shard in self._shards.all:
                    pipe.scard(shard.key("held", worker_id.decode()))
            rows: list[Any] = await pipe.execute()
        width = 1 + len(self._shards.all)
        found: list[WorkerRecord] = []
        for index, (worker_id, seen_at) in enumerate(seen):
            row, *leased = rows[index * width : (index + 1) * width]
            # Not there where the worker has been forgotten since.
            if b"hello" in row:
                found.append(
                    WorkerRecord(
                        worker_id=worker_id.decode(),
                        hello=row[b"hello"],
                        routes=tuple(row[b"routes"].decode().split("\n")),
                        connected_at=float(row[b"connected_at"]),
                        seen_at=seen_at,
                        epoch=row[b"epoch"].decode(),
                        leased=sum(leased),
                        draining=b"draining" in row,
                        silent=float(row.get(b"silent", 0.0)),
                    )
                )
        return found
