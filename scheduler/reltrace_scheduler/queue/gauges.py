"""The state of the whole cluster, read for monitoring."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from reltrace_scheduler.keys import GROUP
from reltrace_scheduler.queue.connection import memory_used
from reltrace_scheduler.queue.store import Shard, Store


@dataclass(frozen=True, slots=True)
class QueueGauge:
    """One queue.

    Attributes
    ----------
    priority, tenant, model : str
        Whose it is. Jobs whose worker fell silent wait apart, as "suspect" and "alone".
    queued, leased : int
        Jobs that wait, and that workers have.
    oldest : float
        Seconds that the first of those that wait has been in this queue; 0: none waits.
    """

    priority: str
    tenant: str
    model: str
    queued: int
    leased: int
    oldest: float


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What is the same whichever scheduler is asked.

    Attributes
    ----------
    queues : tuple of QueueGauge
        Those that hold jobs.
    workers : dict of str to int
        Connected workers by model.
    ended : dict of str to int
        Jobs that ended since the store was made, by state.
    memory : int
        Bytes that Redis uses.
    """

    queues: tuple[QueueGauge, ...] = ()
    workers: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    memory: int = 0


class Gauges:
    """Reads the state of the cluster: a few commands per queue that holds jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self) -> ClusterState:
        """Return the state of the cluster."""
        registry = self._store.registry
        # A route that names a revision has the workers of its model.
        names = [route for route in await registry.models() if "@" not in route]
        alive = time.time() - self._store.settings.lease
        queues: dict[tuple[str, str, str], QueueGauge] = {}
        for shard in self._store.shards:
            for found in await self._queues(shard):
                key = (found.priority, found.tenant, found.model)
                queues[key] = _sum(queues[key], found) if key in queues else found
        return ClusterState(
            queues=tuple(queues.values()),
            workers=dict.fromkeys(names, 0) | await registry.serving(names, seen_since=alive),
            ended=await self._store.ended(),
            memory=await memory_used(self._store.redis),
        )

    async def _queues(self, shard: Shard) -> list[QueueGauge]:
        redis, keys = self._store.redis, shard.keys
        names = await shard.queue.names()
        async with redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.xlen(keys.queue(name))
                pipe.xpending(keys.queue(name), GROUP)
                pipe.xinfo_groups(keys.queue(name))
            rows: list[Any] = await pipe.execute(raise_on_error=False)
        seen = [
            (name, int(length), int(pending["pending"]), groups[0]["last-delivered-id"])
            for name, length, pending, groups in zip(
                names, rows[::3], rows[1::3], rows[2::3], strict=True
            )
            # A queue that became empty since its name was read is gone.
            if not isinstance(pending, Exception) and not isinstance(groups, Exception) and groups
        ]
        async with redis.pipeline(transaction=False) as pipe:
            for name, _, _, delivered in seen:
                # What was delivered last is leased or ended; the first after it waits.
                pipe.xrange(keys.queue(name), b"(" + delivered, "+", count=1)
            first: list[Any] = await pipe.execute(raise_on_error=False)
        now = await shard.upkeep.now()
        return [
            _gauge(name, length, pending, waiting, now)
            for (name, length, pending, _), waiting in zip(seen, first, strict=True)
        ]


def _sum(one: QueueGauge, other: QueueGauge) -> QueueGauge:
    """Put the same queue of two shards together."""
    return replace(
        one,
        queued=one.queued + other.queued,
        leased=one.leased + other.leased,
        oldest=max(one.oldest, other.oldest),
    )


def _gauge(name: str, length: int, pending: int, waiting: Any, now: float) -> QueueGauge:
    priority, tenant, model = name.split(":", 2)
    oldest = 0.0
    if waiting and not isinstance(waiting, Exception):
        # The id of an entry begins with the milliseconds at which it came.
        oldest = max(0.0, now - int(waiting[0][0].partition(b"-")[0]) / 1000)
    return QueueGauge(priority, tenant, model, max(0, length - pending), pending, oldest)
