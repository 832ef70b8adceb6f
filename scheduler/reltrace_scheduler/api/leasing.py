"""Which queues a worker is leased jobs from, and what it holds."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.keys import QueueName
from reltrace_scheduler.queue.shards import Shard
from reltrace_scheduler.queue.signals import Signals
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import Lease, LeasedJob, Priority, WorkerRecord

POLL = 1.0
"""Seconds between looks at a queue while no signal comes."""

_CONCURRENT = 8
"""Sessions that ask one source at the same time; those that wait learn whether it is empty."""

_AT_ONCE = 256
_INTERACTIVE_SHARE = 4
"""One of so many leases that a worker holds is never batch."""
_LEAST_BATCH = 48
"""Batch jobs in one lease at least, if a worker has others: a call costs as much as dozens."""
_MAX_CREDIT = 4096

UNKNOWN = QueueName("", "", "")


@dataclass(frozen=True, slots=True)
class Source:
    """Where jobs for a worker come from: the queues of one route in one shard."""

    shard: Shard
    route: str
    channel: str
    """Signalled when jobs are queued."""


class EmptyQueueCache:
    """The sources that were empty a moment ago, for all sessions of a scheduler.

    A signal wakes all sessions. Without this cache, hundreds of workers would ask Redis for jobs
    that the first of them took, and each of them once a second.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._empty: dict[Source, tuple[int, float]] = {}
        self._limits: dict[Source, asyncio.Semaphore] = {}

    def limit(self, source: Source) -> asyncio.Semaphore:
        return self._limits.setdefault(source, asyncio.Semaphore(_CONCURRENT))

    def count(self, source: Source) -> int:
        """Return what `note_empty` takes, before a source is asked."""
        return self._signals.count(source.channel)

    def note_empty(self, source: Source, count: int) -> None:
        self._empty[source] = (count, time.monotonic())

    def is_empty(self, source: Source) -> bool:
        """Tell whether a source was empty a moment ago, and was not signalled since."""
        count, at = self._empty.get(source, (None, 0.0))
        return count == self.count(source) and time.monotonic() - at < POLL


class Leasing:
    """Leases jobs to one worker, in turn from all queues that it can serve.

    Attributes
    ----------
    held : dict of Lease to QueueName
        What the worker is known to hold; `UNKNOWN` for leases from before its connection.
    """

    def __init__(
        self, store: Store, models: ModelCache, empty: EmptyQueueCache, worker: WorkerRecord
    ) -> None:
        self._shards = store.shards
        self._queue = store.queue
        self._models = models
        self._empty = empty
        self._worker = worker
        self.held: dict[Lease, QueueName] = {}
        self.sources = tuple(
            Source(shard, route, shard.key("wake", route))
            for shard in store.shards.all
            for route in worker.routes
        )
        self._next = 0
        self._credit = 0
        # Classes of jobs that may be held beside others. The class of a lease from before a lost
        # connection is known in its shard only.
        self._shareable = {*Priority} | ({""} if len(store.shards.all) == 1 else set())
        # Has isolated jobs: leased only when the worker holds nothing.
        self._isolated_source: Source | None = None

    @property
    def has_room(self) -> bool:
        """Whether the worker has room for more jobs than it was leased, batch jobs among them."""
        return self._credit > 0 and self._batch_room() > 0

    def add_credit(self, jobs: int) -> None:
        self._credit = min(self._credit + jobs, _MAX_CREDIT)

    def stop(self) -> None:
        """Lease nothing until there is credit again."""
        self._credit = 0

    def drop(self, leases: Iterable[Lease]) -> list[QueueName]:
        """Forget leases that are over; return their queues."""
        return [self.held.pop(lease, UNKNOWN) for lease in leases]

    async def lease(self) -> Sequence[LeasedJob]:
        """Lease queued jobs of one source, as many as there is room for; empty: nothing to do."""
        for source in self._sources_in_turn():
            if not self._credit:
                break
            async with self._empty.limit(source):
                if self._empty.is_empty(source):
                    continue
                signals = self._empty.count(source)
                leased = await self._queue.lease(
                    source.shard,
                    source.route,
                    self._worker.worker_id,
                    self._worker.epoch,
                    min(self._credit, _AT_ONCE),
                    self._batch_room(),
                    (await self._models.get()).workers.get(source.route, 1),
                    held_elsewhere=self._held_outside(source.shard),
                )
                if leased.empty:
                    self._empty.note_empty(source, signals)
            self._isolated_source = source if leased.isolated else None
            if leased.isolated:
                break
            if leased.jobs:
                self._credit -= len(leased.jobs)
                self.held |= {Lease(job.job_id, job.attempt): job.queue for job in leased.jobs}
                return leased.jobs
        return ()

    def _sources_in_turn(self) -> list[Source]:
        """Return the sources to ask now, beginning with another one each time."""
        if self._isolated_source is not None:
            # The jobs that the worker holds must end first.
            return [] if self.held else [self._isolated_source]
        if self._holds_isolated():
            return []
        self._next = (self._next + 1) % len(self.sources)
        rotated = self.sources[self._next :] + self.sources[: self._next]
        return [source for source in rotated if not self._empty.is_empty(source)]

    def _held_outside(self, shard: Shard) -> int:
        if len(self._shards.all) == 1:
            return 0
        return sum(self._shards.of(lease.job_id) is not shard for lease in self.held)

    def _holds_isolated(self) -> bool:
        return any(queue.queue_class not in self._shareable for queue in self.held.values())

    def _batch_room(self) -> int:
        """Return how many batch jobs the worker may be leased; 0 where a few are not worth it."""
        window = self._credit + len(self.held)
        # An interactive job must not wait for a window full of batch jobs.
        most = window - window // _INTERACTIVE_SHARE
        room = most - sum(queue.queue_class == Priority.BATCH for queue in self.held.values())
        return room if room >= min(_LEAST_BATCH, max(1, most // 4)) else 0
