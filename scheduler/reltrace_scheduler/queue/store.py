"""The queue as services see it: one or several shards of Redis keys, told apart by ids."""

import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio import Redis

from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.keys import CLUSTER, SHARDS, Keys, partition, shard_of
from reltrace_scheduler.queue.drafts import Drafts
from reltrace_scheduler.queue.maintenance import Upkeep
from reltrace_scheduler.queue.queue import Queue
from reltrace_scheduler.queue.recent import Recent
from reltrace_scheduler.queue.registry import Registry
from reltrace_scheduler.queue.results import Progress, Results
from reltrace_scheduler.queue.tenants import Tenants
from reltrace_scheduler.records import (
    Ending,
    JobRecord,
    Lease,
    NewChunk,
    NewDraft,
    NewJob,
    Priority,
    QuarantinedJob,
    QueueRecord,
    StoredChunk,
    StoredDraft,
    Submission,
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Shard:
    """A queue with all that belongs to it, under keys of one hash tag."""

    keys: Keys
    queue: Queue
    upkeep: Upkeep
    results: Results
    drafts: Drafts


class Store:
    """All shards.

    A submission is in one of them with all its jobs and results, so nothing but listings and
    sums looks at more than one. Which one, its idempotency key says, or chance.
    """

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.settings = settings
        keys = partition(settings.shards)
        self.shards = tuple(
            Shard(
                keys=each,
                queue=Queue(redis, settings, each),
                upkeep=Upkeep(redis, settings, each),
                results=Results(redis, settings, each),
                drafts=Drafts(redis, each),
            )
            for each in keys
        )
        self._cluster = ""
        self.recent = Recent(redis, keys[0], enabled=settings.web is not None)
        self.registry = Registry(redis, keys)
        self.tenants = Tenants(redis, keys)

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

    def of(self, some_id: str) -> Shard:
        """Return the shard of a submission or job; a made-up id is in none, so in any."""
        number = shard_of(some_id)
        return self.shards[number if number < len(self.shards) else 0]

    async def _each(
        self,
        items: Sequence[Item],
        name: Callable[[Item], str],
        ask: Callable[[Shard, list[Item]], Awaitable[Sequence[Answer]]],
    ) -> list[Answer]:
        """Ask for every item in its own shard; return one answer per item, in their order."""
        if len(self.shards) == 1:
            return list(await ask(self.shards[0], list(items)))
        places: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            places.setdefault(self.of(name(item)).keys.shard, []).append(place)
        answers: dict[int, Answer] = {}
        for shard, indices in places.items():
            found = await ask(self.shards[shard], [items[index] for index in indices])
            answers |= dict(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(items))]

    async def _some(
        self,
        leases: Sequence[Lease],
        ask: Callable[[Shard, list[Lease]], Awaitable[list[Lease]]],
    ) -> list[Lease]:
        """Ask every shard that has some of the leases; return all that they answer."""
        if len(self.shards) == 1:
            return await ask(self.shards[0], list(leases))
        found: list[Lease] = []
        for shard in self.shards:
            if own := [lease for lease in leases if self.of(lease.job_id) is shard]:
                found += await ask(shard, own)
        return found

    # -- clients ----------------------------------------------------------------------

    async def submit(
        self,
        jobs: Sequence[NewJob],
        *,
        tenant: str,
        priority: Priority = Priority.INTERACTIVE,
        idempotency_key: str = "",
    ) -> Submission:
        """Accept jobs, all or none; see `Queue.submit`."""
        shard = self._shard_for(tenant, idempotency_key)
        return await shard.queue.submit(
            jobs, tenant=tenant, priority=priority, idempotency_key=idempotency_key
        )

    async def seen(self, tenant: str, idempotency_key: str, jobs: str) -> Submission | None:
        """Return what was accepted under a key; see `Queue.seen`."""
        shard = self._shard_for(tenant, idempotency_key)
        return await shard.queue.seen(tenant, idempotency_key, jobs)

    def _shard_for(self, tenant: str, idempotency_key: str) -> Shard:
        # The same key must come to the same shard, whichever scheduler it is sent to.
        choice = f"{tenant} {idempotency_key}" if idempotency_key else secrets.token_hex(8)
        digest = hashlib.blake2b(choice.encode(), digest_size=8).digest()
        return self.shards[int.from_bytes(digest, "little") % len(self.shards)]

    async def jobs(self, job_ids: Sequence[str], *, tenant: str) -> list[JobRecord | None]:
        """Look jobs up; see `Queue.jobs`."""
        return await self._each(
            job_ids, str, lambda shard, own: shard.queue.jobs(own, tenant=tenant)
        )

    async def exist(self, job_ids: Sequence[str]) -> list[bool]:
        """Tell which jobs there are: those that have not ended, or whose result is unread."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.exists(self.of(job_id).keys.job(job_id))
            rows: list[Any] = await pipe.execute()
        return [bool(row) for row in rows]

    async def progress(self, submission_id: str) -> Progress | None:
        """Return how far a submission is; see `Results.progress`."""
        return await self.of(submission_id).results.progress(submission_id)

    def read(self, submission_id: str, entry: int, chunk: int) -> AsyncIterator[StoredChunk]:
        """Read results; see `Results.read`."""
        return self.of(submission_id).results.read(submission_id, entry, chunk)

    async def drafts(
        self, submission_id: str, after: Mapping[str, str]
    ) -> dict[str, list[StoredDraft]]:
        """Read drafts of jobs of a submission; see `Drafts.read`."""
        return await self.of(submission_id).drafts.read(after)

    async def acknowledge(self, submission_id: str, through_entry: int) -> int:
        """Free results; see `Results.acknowledge`."""
        return await self.of(submission_id).results.acknowledge(submission_id, through_entry)

    async def end(self, endings: Sequence[Ending]) -> list[str]:
        """End jobs from outside; see `Upkeep.end`."""
        return await self._each(
            endings, lambda ending: ending.job_id, lambda shard, own: shard.upkeep.end(own)
        )

    # -- workers ----------------------------------------------------------------------

    async def renew(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Renew leases; see `Queue.renew`."""
        return await self._some(leases, lambda shard, own: shard.queue.renew(worker, own))

    async def lost(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Return those leases that are not the worker's any more; see `Queue.lost`."""
        return await self._some(leases, lambda shard, own: shard.queue.lost(worker, own))

    async def commit(self, worker: str, chunks: Sequence[NewChunk]) -> list[int]:
        """Store chunks of results; see `Queue.commit`."""
        return await self._each(
            chunks,
            lambda chunk: chunk.lease.job_id,
            lambda shard, own: shard.queue.commit(worker, own),
        )

    async def draft(self, worker: str, drafts: Sequence[NewDraft]) -> None:
        """Keep drafts of texts; see `Drafts.write`."""
        for shard in self.shards:
            if own := [draft for draft in drafts if self.of(draft.lease.job_id) is shard]:
                await shard.drafts.write(worker, own)

    async def release(self, worker: str, leases: Sequence[Lease]) -> None:
        """Queue leased jobs again at once; see `Queue.release`."""

        async def ask(shard: Shard, own: list[Lease]) -> list[Lease]:
            await shard.queue.release(worker, own)
            return []

        await self._some(leases, ask)

    async def retry(self, worker: str, leases: Sequence[Lease]) -> list[Lease]:
        """Queue leased jobs again after a while; see `Queue.retry`."""
        return await self._some(leases, lambda shard, own: shard.queue.retry(worker, own))

    async def reconcile(self, worker: str, leases: Sequence[Lease]) -> int:
        """Queue again what a worker does not know of; see `Queue.reconcile`."""
        return sum(
            [
                await shard.queue.reconcile(
                    worker, [lease for lease in leases if self.of(lease.job_id) is shard]
                )
                for shard in self.shards
            ]
        )

    # -- operators --------------------------------------------------------------------

    async def depths(self) -> dict[str, QueueRecord]:
        """Count the queued and the leased jobs of each route that has any."""
        totals: dict[str, QueueRecord] = {}
        for shard in self.shards:
            for route, record in (await shard.queue.depths()).items():
                before = totals.get(route, QueueRecord(route, 0, 0))
                totals[route] = QueueRecord(
                    route, before.queued + record.queued, before.leased + record.leased
                )
        return totals

    async def ended(self) -> dict[str, int]:
        """Count jobs that ended, by state, since the store was made."""
        totals: Counter[str] = Counter()
        for shard in self.shards:
            totals.update(await shard.queue.ended())
        return dict(totals)

    async def quarantined(self, limit: int) -> list[QuarantinedJob]:
        """Return jobs that were quarantined, latest first."""
        found = [job for shard in self.shards for job in await shard.upkeep.quarantined(limit)]
        found.sort(key=lambda job: job.lost[-1].lost_at if job.lost else 0.0, reverse=True)
        return found[:limit]

    async def quarantined_jobs(self, job_ids: Sequence[str]) -> list[QuarantinedJob | None]:
        """Look quarantined jobs up; see `Upkeep.quarantined_jobs`."""
        return await self._each(job_ids, str, lambda shard, own: shard.upkeep.quarantined_jobs(own))

    async def forget_quarantined(self, job_id: str) -> None:
        """Forget a quarantined job."""
        await self.of(job_id).upkeep.forget_quarantined(job_id)
