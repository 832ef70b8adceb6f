"""The state of the whole cluster, read for monitoring."""

import time
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.store.keys import GROUP, Keys
from reltrace_scheduler.store.queue import Queue
from reltrace_scheduler.store.registry import Registry


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
    """Reads the state of the cluster: a few commands per queue that holds jobs.

    Parameters
    ----------
    lease : float
        Seconds after which a silent worker does not count any more.
    """

    def __init__(
        self, redis: Redis, queue: Queue, registry: Registry, keys: Keys, lease: float
    ) -> None:
        self._redis = redis
        self._queue = queue
        self._registry = registry
        self._keys = keys
        self._lease = lease

    async def read(self) -> ClusterState:
        """Return the state of the cluster."""
        workers: dict[str, int] = dict.fromkeys(await self._registry.models(), 0)
        for worker in await self._registry.workers(seen_since=time.time() - self._lease):
            workers[worker.model] = workers.get(worker.model, 0) + 1
        info: Any = await self._redis.info("memory")
        return ClusterState(
            queues=await self._queues(),
            workers=workers,
            ended=await self._queue.ended(),
            memory=int(info["used_memory"]),
        )

    async def _queues(self) -> tuple[QueueGauge, ...]:
        names = await self._queue.names()
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.xlen(self._keys.queue(name))
                pipe.xpending(self._keys.queue(name), GROUP)
                pipe.xinfo_groups(self._keys.queue(name))
            rows: list[Any] = await pipe.execute(raise_on_error=False)
        seen = [
            (name, int(length), int(pending["pending"]), groups[0]["last-delivered-id"])
            for name, length, pending, groups in zip(
                names, rows[::3], rows[1::3], rows[2::3], strict=True
            )
            # A queue that became empty since its name was read is gone.
            if not isinstance(pending, Exception) and not isinstance(groups, Exception) and groups
        ]
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, _, _, delivered in seen:
                # What was delivered last is leased or ended; the first after it waits.
                pipe.xrange(self._keys.queue(name), b"(" + delivered, "+", count=1)
            first: list[Any] = await pipe.execute(raise_on_error=False)
            now: Any = await self._redis.time()
        return tuple(
            _gauge(name, length, pending, waiting, now[0] + now[1] / 1e6)
            for (name, length, pending, _), waiting in zip(seen, first, strict=True)
        )


def _gauge(name: str, length: int, pending: int, waiting: Any, now: float) -> QueueGauge:
    priority, tenant, model = name.split(":", 2)
    oldest = 0.0
    if waiting and not isinstance(waiting, Exception):
        # The id of an entry begins with the milliseconds at which it came.
        oldest = max(0.0, now - int(waiting[0][0].partition(b"-")[0]) / 1000)
    return QueueGauge(priority, tenant, model, max(0, length - pending), pending, oldest)
