"""Tenants: their shares, their bounds and what they hold."""

from collections.abc import Awaitable, Sequence
from typing import Any, cast

from redis.asyncio import Redis

from reltrace_scheduler.keys import Keys
from reltrace_scheduler.records import Limits, TenantRecord


class Tenants:
    """Settings of tenants; they live in Redis, so that every scheduler follows them.

    Parameters
    ----------
    shards : sequence of Keys
        Each holds the settings, and what the tenant has there.
    """

    def __init__(self, redis: Redis, shards: Sequence[Keys]) -> None:
        self._redis = redis
        self._shards = shards

    async def all(self) -> list[TenantRecord]:
        """Return every tenant that ever had jobs or was set."""
        names: set[Any] = set()
        for keys in self._shards:
            names |= await cast("Awaitable[set[Any]]", self._redis.smembers(keys.tenants))
        return [await self.get(name) for name in sorted(name.decode() for name in names)]

    async def get(self, tenant: str) -> TenantRecord:
        """Return one tenant, known or not."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for keys in self._shards:
                pipe.hgetall(keys.tenant(tenant))
            rows: list[Any] = await pipe.execute()
        row = rows[0]
        return TenantRecord(
            tenant=tenant,
            limits=Limits(
                weight=_optional(float, row.get(b"weight")),
                max_jobs=_optional(int, row.get(b"max_jobs")),
                max_bytes=_optional(int, row.get(b"max_bytes")),
            ),
            jobs=_sum(rows, b"jobs"),
            bytes=_sum(rows, b"bytes") + _sum(rows, b"results"),
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
        async with self._redis.pipeline(transaction=False) as pipe:
            for keys in self._shards:
                pipe.sadd(keys.tenants, tenant)
                if mapping:
                    pipe.hset(keys.tenant(tenant), mapping=mapping)
            await pipe.execute()
        return await self.get(tenant)


def _sum(rows: list[Any], field: bytes) -> int:
    return sum(int(row.get(field, 0)) for row in rows)


def _optional(convert: Any, value: bytes | None) -> Any:
    return None if value is None else convert(value)
