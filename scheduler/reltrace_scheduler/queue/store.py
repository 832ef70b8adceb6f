"""The request queue in Redis, put together from its parts."""

import asyncio
import contextlib
import secrets
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from reltrace_scheduler import __version__
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.keys import CLUSTER, SCHEMA, SCHEMA_VERSION, SHARDS
from reltrace_scheduler.queue.bounds import Bounds
from reltrace_scheduler.queue.job_queue import JobQueue
from reltrace_scheduler.queue.quarantine import Quarantine
from reltrace_scheduler.queue.recent import RecentJobs
from reltrace_scheduler.queue.registry import Registry
from reltrace_scheduler.queue.results import Results
from reltrace_scheduler.queue.shards import Shards
from reltrace_scheduler.queue.tenants import Tenants
from reltrace_scheduler.queue.trouble import REDIS_ERRORS, reason_of

_SCHEMA_PERIOD = 2.0
"""Seconds between looks at the version of the keys."""

_ANSWER_DEADLINE = 3.0
"""Seconds after which a Redis that does not answer is away."""


class Store:
    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        self.shards = Shards(redis, settings.shards, settings.redis_replicas)
        self.bounds = Bounds(self.shards, settings)
        self.queue = JobQueue(self.shards, settings, self.bounds)
        self.results = Results(self.shards, settings, self.bounds)
        self.quarantine = Quarantine(self.shards)
        self.registry = Registry(self.shards, settings)
        self.tenants = Tenants(self.shards)
        self.recent = RecentJobs(self.shards, enabled=settings.web is not None)
        self._cluster = ""

    async def open(self) -> None:
        """Check that all schedulers of this Redis agree on keys and shards; learn its name.

        Raises
        ------
        StartError
            The keys are of another schema, another number of shards was used before, or Redis is
            not ready.
        """
        count = self.settings.shards
        try:
            # What has no version is from before there were any.
            new = 1 if await self.redis.exists(SHARDS) else SCHEMA_VERSION
            if fault := _schema_fault(await self._get_or_set(SCHEMA, str(new))):
                raise StartError(fault)
            stored = (await self._get_or_set(SHARDS, str(count))).decode(errors="replace")
            self._cluster = (await self._get_or_set(CLUSTER, secrets.token_hex(4))).decode()
            await self.bounds.refresh()
        except REDIS_ERRORS as error:
            raise StartError(f"Redis is not ready: {reason_of(error)}") from error
        if stored != str(count):
            raise StartError(
                f"--shards {count}: the queue in this Redis has {stored}; the number can "
                "be changed only while it is empty, by deleting its keys (reltrace:*)"
            )

    async def superseded(self) -> str:
        """Wait until the keys are made those of another schema; return what to tell the operator.

        Whoever does that relies on it that we end: our scripts would destroy them.
        """
        while True:
            await asyncio.sleep(_SCHEMA_PERIOD)
            with contextlib.suppress(*REDIS_ERRORS):
                found: Any = await self.redis.get(SCHEMA)
                if found is not None and (fault := _schema_fault(found)):
                    return fault

    async def _get_or_set(self, key: str, value: str) -> bytes:
        # Read first: a Redis that is full takes no SET, even of what is there.
        found: Any = await self.redis.get(key)
        if found is None:
            await self.redis.set(key, value, nx=True)
            found = await self.redis.get(key)
        return bytes(found)

    async def check_writes(self) -> None:
        """Have every shard take a write that changes nothing; raises what Redis says against it.

        A full Redis takes it: results can be read and freed there, which is what makes room.
        """
        try:
            async with (
                asyncio.timeout(_ANSWER_DEADLINE),
                self.redis.pipeline(transaction=False) as pipe,
            ):
                for shard in self.shards.all:
                    pipe.delete(shard.key("nothing"))
                await pipe.execute()
        except TimeoutError:
            message = f"no answer within {_ANSWER_DEADLINE:.0f} s"
            raise RedisTimeoutError(message) from None

    @property
    def results_url(self) -> str:
        """Folder of this queue's large results, beside those of others; empty: there is none."""
        url = self.settings.results_url
        return url and f"{url}/{self._cluster}"


def _schema_fault(found: bytes) -> str:
    text = found.decode(errors="replace")
    if text == str(SCHEMA_VERSION):
        return ""
    return (
        f"the keys in this Redis are of schema {text}, and reltrace {__version__} knows schema "
        f"{SCHEMA_VERSION}: run schedulers of the version that wrote them, or name another Redis"
    )
