"""What one worker holds, and from which queues it is leased more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reltrace_scheduler.api.idle_queues import Idleness, Source
from reltrace_scheduler.api.models import ModelCache
from reltrace_scheduler.queue.store import Shard, Store
from reltrace_scheduler.records import Lease, LeasedJob, Priority

_AT_ONCE = 256
_INTERACTIVE_SHARE = 4
"""One of so many leases that a worker holds is never batch."""
_LEAST_BATCH = 48
"""Fewer jobs of batch are not leased while a worker has others: a lease costs as much as dozens."""
_MOST_CREDIT = 4096


@dataclass(frozen=True, slots=True)
class Held:
    """What is known of a lease beside its name; "" is not known, after a cut line."""

    route: str = ""
    tenant: str = ""
    queue_class: str = ""


class Leasing:
    """Leases jobs to one worker, out of all queues that it can serve, in turn.

    Parameters
    ----------
    routes : sequence of str
        What the worker serves.
    """

    def __init__(
        self,
        store: Store,
        models: ModelCache,
        idleness: Idleness,
        worker_id: str,
        epoch: str,
        routes: Sequence[str],
    ) -> None:
        self._idleness = idleness
        self.sources = tuple(Source(shard, r) for shard in store.shards for r in routes)
        self._store = store
        self._models = models
        self._worker_id = worker_id
        self._epoch = epoch
        self._credit = 0
        self._held: dict[Lease, Held] = {}
        # Sources that may have something; the others are silent until they are signalled.
        self._lively = set(self.sources)
        self._next = 0
        # Classes whose jobs may be held beside others. Of what was held before a cut line the class
        # is not known here, but in its own shard.
        self._ordinary = {*Priority} | ({""} if len(store.shards) == 1 else set())
        self._suspects: Source | None = None
        """Has jobs for a worker that holds nothing else, as this one then must not."""

    @property
    def has_room(self) -> bool:
        """Whether there is room for more jobs than it got, also of batch."""
        return self._credit > 0 and self._batch_room() > 0

    @property
    def leases(self) -> list[Lease]:
        """All that the worker is known to hold."""
        return list(self._held)

    def offered(self, jobs: int) -> None:
        """Note that the worker has room for so many further jobs."""
        self._credit = min(self._credit + jobs, _MOST_CREDIT)

    def closed(self) -> None:
        """Note that it wants no more."""
        self._credit = 0

    def known(self, leases: Iterable[Lease]) -> None:
        """Begin with what a worker says that it holds."""
        self._held = dict.fromkeys(leases, Held())

    def drop(self, leases: Iterable[Lease]) -> list[Held]:
        """Forget leases that are over; return what was known of them."""
        return [self._held.pop(lease, Held()) for lease in leases]

    def held(self, lease: Lease) -> Held:
        """Return what is known of a lease."""
        return self._held.get(lease, Held())

    def wake(self, channels: set[str]) -> None:
        """Look at these sources again."""
        self._lively |= {source for source in self.sources if source.channel in channels}

    def look_again(self) -> None:
        """Look at all sources again: a signal may have been missed."""
        self._lively = set(self.sources)

    async def lease(self) -> list[LeasedJob]:
        """Lease queued jobs, as many as the worker has room for; empty: nothing to do."""
        jobs: list[LeasedJob] = []
        for source in self._in_turn():
            if not self._credit:
                break
            async with self._idleness.turn(source):
                if self._idleness.is_empty(source):
                    self._lively.discard(source)
                    continue
                signals = self._idleness.count(source)
                leased = await source.shard.queue.lease(
                    source.route,
                    self._worker_id,
                    self._epoch,
                    min(self._credit, _AT_ONCE),
                    self._batch_room(),
                    (await self._models.get()).workers.get(source.route, 1),
                    elsewhere=self._elsewhere(source.shard),
                )
                if leased.idle:
                    self._idleness.note_empty(source, signals)
            self._credit -= len(leased.jobs)
            self._held |= {
                Lease(job.job_id, job.attempt): Held(job.route, job.tenant, job.queue_class)
                for job in leased.jobs
            }
            jobs += leased.jobs
            self._suspects = source if leased.suspects else None
            if leased.idle:
                self._lively.discard(source)
            if leased.suspects or self._isolated():
                break
        return jobs

    def _in_turn(self) -> list[Source]:
        """Return the sources to ask now, another one first each time."""
        if self._suspects is not None:
            # What it holds from elsewhere must end first, so nothing is added to it.
            return [] if self._held else [self._suspects]
        if self._isolated():
            return []
        self._next = (self._next + 1) % len(self.sources)
        turned = self.sources[self._next :] + self.sources[: self._next]
        return [source for source in turned if source in self._lively]

    def _elsewhere(self, shard: Shard) -> int:
        if len(self._store.shards) == 1:
            return 0
        return sum(self._store.of(lease.job_id) is not shard for lease in self._held)

    def _isolated(self) -> bool:
        """Tell whether it holds jobs that nothing may be held beside."""
        return any(held.queue_class not in self._ordinary for held in self._held.values())

    def _batch_room(self) -> int:
        """Return how many jobs of batch the worker may be given; 0 where a few are not worth it."""
        window = self._credit + len(self._held)
        # Who waits for an interactive job must not wait for a window full of batch.
        most = window - window // _INTERACTIVE_SHARE
        room = most - sum(held.queue_class == Priority.BATCH for held in self._held.values())
        return room if room >= min(_LEAST_BATCH, max(1, most // 4)) else 0
