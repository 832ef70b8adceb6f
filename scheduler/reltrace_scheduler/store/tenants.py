"""Tenants: their shares, their bounds and what they hold."""

from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.store.keys import Keys
from reltrace_scheduler.store.records import Limits, TenantRecord


class Tenants:
    """Settings of tenants; they live in Redis, so that every scheduler follows them."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def all(self) -> list[TenantRecord]:
        """Return every tenant that ever had jobs or was set."""
        names: Any = await self._redis.smembers(self._keys.tenants)
        return [await self.get(name) for name in sorted(name.decode() for name in names)]

    async def get(self, tenant: str) -> TenantRecord:
        """Return one tenant, known or not."""
        row: Any = await self._redis.hgetall(self._keys.tenant(tenant))
        return TenantRecord(
            tenant=tenant,
            limits=Limits(
                weight=_optional(float, row.get(b"weight")),
                max_jobs=_optional(int, row.get(b"max_jobs")),
                max_bytes=_optional(int, row.get(b"max_bytes")),
            ),
            jobs=int(row.get(b"jobs", 0)),
            bytes=int(row.get(b"bytes", 0)) + int(row.get(b"results", 0)),
        )

    async def set(self, tenant: str, limits: Limits) -> TenantRecord:
        """Set what is not None, and return the tenant."""
        given = {
            "weight": limits.weight,
            "max_jobs": limits.max_jobs,
            "max_bytes": limits.max_bytes,
        }
        mapping: dict[Any, Any] = {
            name: repr(value) for name, value in given.items() if value is not None
        }
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.sadd(self._keys.tenants, tenant)
            if mapping:
                pipe.hset(self._keys.tenant(tenant), mapping=mapping)
            await pipe.execute()
        return await self.get(tenant)


def _optional(convert: Any, value: bytes | None) -> Any:
    return None if value is None else convert(value)
