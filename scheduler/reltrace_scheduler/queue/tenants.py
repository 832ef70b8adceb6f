"""Tenants: their shares, their bounds and what they hold."""

from dataclasses import asdict
from typing import Any

from reltrace_scheduler.queue.shards import Shards
from reltrace_scheduler.records import Limits, TenantRecord


class Tenants:
    """Settings of tenants; they are in Redis, in every shard, so that every scheduler has them."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards.all
        self._redis = shards.redis

    async def all(self) -> list[TenantRecord]:
        """Return every tenant that has jobs, unread results or limits."""
        return [await self.get(name) for name in sorted(await self.names())]

    async def names(self) -> set[str]:
        names: set[bytes] = set()
        for shard in self._shards:
            members: Any = await self._redis.smembers(shard.key("tenants"))
            names |= members
        return {name.decode() for name in names}

    async def forget_idle(self) -> None:
        """Forget tenants that hold nothing and have no limits."""
        for shard in self._shards:
            cursor: Any = b"0"
            while (cursor := await shard.run("forget_tenants", [], cursor)) != b"0":
                pass

    async def get(self, tenant: str) -> TenantRecord:
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in self._shards:
                pipe.hgetall(shard.key("tenant", tenant))
            rows: list[Any] = await pipe.execute()

        def total(field: bytes) -> int:
            return sum(int(row.get(field, 0)) for row in rows)

        weight, max_jobs, max_bytes = map(rows[0].get, (b"weight", b"max_jobs", b"max_bytes"))
        return TenantRecord(
            tenant=tenant,
            limits=Limits(
                weight=None if weight is None else float(weight),
                max_jobs=None if max_jobs is None else int(max_jobs),
                max_bytes=None if max_bytes is None else int(max_bytes),
            ),
            jobs=total(b"jobs"),
            bytes=total(b"bytes") + total(b"results"),
            unread=total(b"results"),
        )

    async def set(self, tenant: str, limits: Limits) -> TenantRecord:
        """Set the limits that are not None, and return the tenant."""
        mapping: dict[Any, Any] = {
            name: repr(value) for name, value in asdict(limits).items() if value is not None
        }
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in self._shards:
                pipe.sadd(shard.key("tenants"), tenant)
                if mapping:
                    pipe.hset(shard.key("tenant", tenant), mapping=mapping)
            await pipe.execute()
        return await self.get(tenant)
