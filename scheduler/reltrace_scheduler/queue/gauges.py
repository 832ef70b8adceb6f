"""The state of the whole cluster, read for monitoring."""

from dataclasses import dataclass, replace
from typing import Any

from reltrace_scheduler.keys import GROUP, QueueName
from reltrace_scheduler.queue.connection import memory_of_nodes
from reltrace_scheduler.queue.shards import Shard
from reltrace_scheduler.queue.store import Store


@dataclass(frozen=True, slots=True)
class QueueGauge:
    priority: str
    """Or the class of isolated jobs: "isolate_group" or "isolate_single"."""
    tenant: str
    model: str
    queued: int
    leased: int
    oldest: float
    """Seconds since the first queued job entered this queue; 0: none is queued."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The state that all schedulers share."""

    queues: tuple[QueueGauge, ...]
    """Those that hold jobs."""
    workers: dict[str, int]
    """Connected workers by model."""
    ended: dict[str, int]
    """Jobs that ended since the queue was made, by state."""
    used_part: float
    """Of the `maxmemory` of the server that is the fullest; 0: it has none."""
    memory: int
    """Bytes that Redis uses."""


async def read_cluster(store: Store) -> ClusterState:
    """Read the state of the cluster: a few commands per queue that holds jobs."""
    # A route that names a revision has the workers of its model.
    names = [route for route in await store.registry.models() if "@" not in route]
    nodes = await memory_of_nodes(store.redis)
    return ClusterState(
        queues=await read_queues(store),
        workers=dict.fromkeys(names, 0) | await store.registry.serving(names),
        ended=await store.queue.ended(),
        used_part=max(node.used_part for node in nodes),
        memory=sum(node.used for node in nodes),
    )


async def read_queues(store: Store) -> tuple[QueueGauge, ...]:
    """Read every queue that exists, summed over the shards."""
    queues: dict[QueueName, QueueGauge] = {}
    for shard in store.shards.all:
        for name, found in (await _read_shard(shard)).items():
            before = queues.get(name)
            queues[name] = found if before is None else _sum(before, found)
    return tuple(queues.values())


async def _read_shard(shard: Shard) -> dict[QueueName, QueueGauge]:
    names = [QueueName.parse(name) for name in await shard.queues()]
    async with shard.redis.pipeline(transaction=False) as pipe:
        for name in names:
            stream = shard.key("queue", str(name))
            pipe.xlen(stream)
            pipe.xpending(stream, GROUP)
            pipe.xinfo_groups(stream)
        rows: list[Any] = await pipe.execute(raise_on_error=False)
    sizes: dict[QueueName, tuple[int, int]] = {}
    async with shard.redis.pipeline(transaction=False) as pipe:
        for name, length, pending, groups in zip(
            names, rows[::3], rows[1::3], rows[2::3], strict=True
        ):
            # A queue that became empty since its name was read has been deleted.
            if isinstance(pending, Exception) or isinstance(groups, Exception) or not groups:
                continue
            leased = int(pending["pending"])
            sizes[name] = (max(0, int(length) - leased), leased)
            # What was delivered last is leased or ended; the first entry after it is queued.
            after = b"(" + groups[0]["last-delivered-id"]
            pipe.xrange(shard.key("queue", str(name)), after, "+", count=1)
        first: list[Any] = await pipe.execute(raise_on_error=False)
    now = await shard.now()
    return {
        name: QueueGauge(
            name.queue_class, name.tenant, name.route, queued, leased, _age(entries, now)
        )
        for (name, (queued, leased)), entries in zip(sizes.items(), first, strict=True)
    }


def _age(entries: Any, now: int) -> float:
    if not entries or isinstance(entries, Exception):
        return 0.0
    # The id of an entry begins with the milliseconds at which it came.
    return max(0.0, (now - int(entries[0][0].partition(b"-")[0])) / 1000)


def _sum(one: QueueGauge, other: QueueGauge) -> QueueGauge:
    return replace(
        one,
        queued=one.queued + other.queued,
        leased=one.leased + other.leased,
        oldest=max(one.oldest, other.oldest),
    )
