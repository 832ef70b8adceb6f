"""Forgets what nobody uses any more: models without workers, idle tenants, and their metrics."""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any

import structlog

from reltrace_scheduler.api.reaper import attempt
from reltrace_scheduler.api.terminal_results import end, unserved
from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.shards import Shard
from reltrace_scheduler.queue.store import Store

log = structlog.get_logger()

_PERIOD = 60.0

_METRICS_TTL = 24 * 3600.0
"""Seconds that metrics of a tenant or model go on: a counter that begins anew loses a little."""

_AT_ONCE = 256


class Forgetting:
    """Runs in every scheduler: each change is one atomic script, so that they do not conflict."""

    def __init__(self, store: Store, counts: Counts) -> None:
        self._store = store
        self._counts = counts
        # Labels of metrics whose tenant or model is not known any more, by when that was found.
        self._gone_since: dict[tuple[str, str], float] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            for step, work in (
                ("models", self.forget_models),
                ("tenants", self._store.tenants.forget_idle),
                ("metrics", self._forget_metrics),
            ):
                await attempt(step, work(), self._counts)
            await asyncio.sleep(_PERIOD)

    async def models(self) -> dict[str, int]:
        """Return how many workers each known route has at present."""
        registry = self._store.registry
        routes = sorted(await registry.models())
        return dict.fromkeys(routes, 0) | await registry.serving(routes)

    async def forget_models(self, *names: str) -> list[str]:
        """Forget models whose time is over, and those that are named; end the jobs for them.

        Returns the routes that were forgotten; one that has a worker is not.
        """
        registry = self._store.registry
        forgotten = await registry.forget_models(names, ttl=self._store.settings.model_ttl)
        if forgotten:
            log.info("models.forgotten", models=forgotten)
        for shard in self._store.shards.all:
            queues = [QueueName.parse(name) for name in await shard.queues()]
            # Read after the queues: a job is accepted only for a route that is known.
            known = await registry.models()
            for queue in queues:
                if queue.route not in known:
                    await self._end_jobs(shard, queue)
        return forgotten

    async def _end_jobs(self, shard: Shard, queue: QueueName) -> None:
        # Those that wait elsewhere (for another attempt, for a reader) come here in time.
        while ids := await _queued(shard, queue):
            ended = await end(
                self._store, self._counts, [unserved(job_id, queue.route) for job_id in ids]
            )
            log.warning("jobs.unserved", model=queue.route, tenant=queue.tenant, jobs=ended)
            if not ended:
                return

    async def _forget_metrics(self) -> None:
        known = {
            "tenant": await self._store.tenants.names(),
            "model": set(await self._store.registry.models()),
        }
        now = monotonic()
        gone = {
            label
            for label in self._counts.labels("tenant", "model")
            if label[1] not in known[label[0]]
        }
        self._gone_since = {label: self._gone_since.get(label, now) for label in gone}
        for label, since in self._gone_since.items():
            if now - since >= _METRICS_TTL:
                self._counts.forget(*label)


async def _queued(shard: Shard, queue: QueueName) -> Sequence[str]:
    """Return the first jobs of a queue."""
    entries: Any = await shard.redis.xrange(shard.key("queue", str(queue)), count=_AT_ONCE)
    return [fields[b"j"].decode() for _, fields in entries]
