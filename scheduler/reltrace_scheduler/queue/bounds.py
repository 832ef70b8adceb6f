"""The bounds on what the queue keeps in Redis: those of the settings, within Redis' own memory."""

from typing import Any

import structlog

from reltrace_scheduler.config import Settings
from reltrace_scheduler.queue.connection import memory_of_nodes
from reltrace_scheduler.queue.shards import Shards

log = structlog.get_logger()

_PART = 0.75
"""Of Redis' memory that specifications and results may take together. The rest is for what comes
and goes (messages, replies), and for what values take beyond their bytes until that is measured."""

_WATCHED, _UNSEEN = 0.5, 1 / 32
"""Part of Redis' memory from which on it is looked at before each submission; before, as often as
this part of it was submitted."""

_JOB = 1024
"""Bytes that a job takes in Redis beside its specification, at most about."""

_RESULTS = 16
"""One result may take one of so many parts of Redis' memory."""


class Bounds:
    """Bounds in bytes; `refresh` adapts them to Redis' `maxmemory` and to what else fills it.

    Attributes
    ----------
    max_bytes : int
        Of all specifications, and as much again of unread results.
    tenant_max_bytes : int
        The same of each tenant that has no bound of its own.
    max_unread : int
        Of a submission's unread results: its further jobs wait for its reader.
    max_result_bytes : int
        Of one result.
    results_above : int
        Of a job's tensors: more go to the store of large results, if there is one.
    """

    def __init__(self, shards: Shards, settings: Settings) -> None:
        self._shards = shards
        self._settings = settings
        self._limit: int | None = None
        self._used_part, self._new = 0.0, 0
        self._set(settings.max_bytes, settings.max_result_bytes)

    async def refresh(self) -> None:
        """Read Redis' memory, and set the bounds that it allows."""
        nodes = await memory_of_nodes(self._shards.redis)
        limit = min((node.limit for node in nodes if node.limit), default=0)
        self._used_part, self._new = max(node.used_part for node in nodes), 0
        settings = self._settings
        max_bytes, max_result_bytes = settings.max_bytes, settings.max_result_bytes
        if limit:
            used = sum(node.used - node.buffers for node in nodes)
            # What Redis needs beside the bytes that are counted: keys, padding, other data.
            overhead = max(0, used - await self._counted()) / len(nodes)
            # The node that has most shards is full first.
            shards = settings.shards
            nodes_full = shards / -(-shards // len(nodes))
            # Not less than half: a bound that falls with what others store for a moment would
            # have submissions refused for good.
            room = max(_PART * limit - overhead, _PART * limit / 2) * nodes_full
            # Half of it for specifications: then there is always room for results, which free them.
            max_bytes = min(max_bytes, int(room / 2))
            max_result_bytes = min(max_result_bytes, limit // _RESULTS)
        self._set(max_bytes, max_result_bytes)
        if limit != self._limit:
            self._limit = limit
            log.info(
                "redis.memory",
                maxmemory=limit or "none: nothing but --max-bytes bounds what is kept there",
                max_bytes=self.max_bytes,
                max_result_bytes=self.max_result_bytes,
            )

    async def are_reached(self, jobs: int, size: int) -> bool:
        """Tell whether Redis is so full that only results may come, which free what it holds.

        Small jobs take more memory than the bytes that are counted of them. Asked before jobs of
        so many bytes are submitted.
        """
        self._new += size + jobs * _JOB
        if self._limit and (self._used_part > _WATCHED or self._new > _UNSEEN * self._limit):
            await self.refresh()
        return self._used_part > _PART

    def _set(self, max_bytes: int, max_result_bytes: int) -> None:
        settings = self._settings
        self.max_bytes = max_bytes
        self.tenant_max_bytes = settings.tenant_max_bytes
        self.max_unread = settings.max_unread
        if max_bytes < settings.max_bytes:
            self.tenant_max_bytes = min(self.tenant_max_bytes, max_bytes // 2)
            self.max_unread = min(self.max_unread, max_bytes // 4)
        self.max_result_bytes = max_result_bytes
        # A result also has a header.
        self.results_above = min(settings.results_above, max_result_bytes // 2)

    async def _counted(self) -> int:
        total = 0
        for shard in self._shards.all:
            row: Any = await shard.redis.hmget(shard.key("load"), "bytes", "results")
            total += sum(int(value or 0) for value in row)
        return total
