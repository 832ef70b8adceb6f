"""The request queue in Redis, put together from its parts."""

import secrets
from typing import Any

from redis.asyncio import Redis

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.keys import CLUSTER, SHARDS
from reltrace_scheduler.queue.bounds import Bounds
from reltrace_scheduler.queue.job_queue import JobQueue
from reltrace_scheduler.queue.quarantine import Quarantine
from reltrace_scheduler.queue.recent import RecentJobs
from reltrace_scheduler.queue.registry import Registry
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.queue.shards import Shards
from reltrace_scheduler.queue.tenants import Tenants


class Store:
    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.shards = Shards(redis, settings.shards)
        self.bounds = Bounds(self.shards, settings)
        self.queue = JobQueue(self.shards, settings, self.bounds)
        self.results = Results(self.shards, settings, self.bounds)
        self.quarantine = Quarantine(self.shards)
        self.registry = Registry(self.shards)
        self.tenants = Tenants(self.shards)
        self.recent = RecentJobs(self.shards, enabled=settings.web is not None)
        self._cluster = ""

    async def open(self) -> None:
        """Check that all schedulers of this Redis agree on the number of shards; learn its name.

        Raises
        ------
        StartError
            Another number was used before.
        """
        count = self.settings.shards
        await self.redis.set(SHARDS, count, nx=True)
        stored: Any = await self.redis.get(SHARDS)
        if int(stored) != count:
            raise StartError(
                f"--shards {count}: the queue in this Redis has {int(stored)}; the number can "
                "be changed only while it is empty, by deleting its keys (reltrace:*)"
            )
        await self.redis.set(CLUSTER, secrets.token_hex(4), nx=True)
        name: Any = await self.redis.get(CLUSTER)
        self._cluster = name.decode()

    @property
    def results_url(self) -> str:
        """Folder of this queue's large results, beside those of others; empty: there is none."""
        url = self.settings.results_url
        return url and f"{url}/{self._cluster}"
