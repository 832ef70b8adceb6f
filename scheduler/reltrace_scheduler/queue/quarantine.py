"""Jobs that lost too many leases, kept for operators."""

from collections.abc import Sequence
from typing import Any

from reltrace_scheduler.queue.shards import Shards
from reltrace_scheduler.records import LostLease, Priority, QuarantinedJob

_AT_ONCE, _MOST_BYTES = 4, 32 << 20
"""Jobs that are read at a time, and bytes of specifications in one listing."""


class Quarantine:
    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._redis = shards.redis

    async def latest(self, limit: int) -> list[QuarantinedJob]:
        """Return jobs, the latest first; of large ones, fewer than `limit`."""
        ids: list[Any] = []
        for shard in self._shards.all:
            key = shard.key("quarantined")
            ids += await self._redis.zrevrange(key, 0, limit - 1, withscores=True)
        ids.sort(key=lambda entry: entry[1], reverse=True)
        found: list[QuarantinedJob] = []
        left = _MOST_BYTES
        for start in range(0, min(limit, len(ids)), _AT_ONCE):
            page = ids[start : min(limit, start + _AT_ONCE)]
            for job in await self.get([job_id.decode() for job_id, _ in page]):
                if job is None:
                    continue
                left -= len(job.spec)
                if left < 0 and found:
                    return found
                found.append(job)
        return found

    async def get(self, job_ids: Sequence[str]) -> list[QuarantinedJob | None]:
        """Look jobs up; None for one that is unknown or too old."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                key = self._shards.of(job_id).key("quarantined", job_id)
                pipe.hmget(key, "tenant", "spec", "history", "priority")
            rows: Any = await pipe.execute()
        return [
            QuarantinedJob(
                job_id,
                tenant.decode(),
                spec,
                parse_history(history),
                # None in what was quarantined before priorities were kept.
                Priority.BATCH if priority == b"batch" else Priority.INTERACTIVE,
            )
            if tenant
            else None
            for job_id, (tenant, spec, history, priority) in zip(job_ids, rows, strict=True)
        ]

    async def forget(self, job_id: str) -> None:
        key = self._shards.of(job_id).key
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zrem(key("quarantined"), job_id)
            pipe.delete(key("quarantined", job_id))
            await pipe.execute()


def parse_history(lines: bytes) -> tuple[LostLease, ...]:
    """Return the lost leases of a job from its field ``history``."""
    rows = (line.split(" ") for line in lines.decode().splitlines())
    return tuple(LostLease(int(n), worker, int(at) / 1000) for n, worker, at in rows)
