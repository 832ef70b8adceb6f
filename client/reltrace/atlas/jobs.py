"""Slices as jobs: their results are read as many at a time as fit in memory.

The keys of jobs let a later build find results that the server has already.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count

from reltrace.atlas.settings import AtlasSettings
from reltrace.calls.pinning import Pins
from reltrace.transport.connection import Connection
from reltrace.transport.pending import Submission
from reltrace.transport.results import acknowledge, stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import Rejected, is_key_taken, submit
from reltrace.types.atlas_shard import AtlasShard
from reltrace.types.errors import InvalidArgument, NotFound, TraceError
from reltrace.types.request import Job, wire_priority

_PREFETCH_BYTES = 256 * 1024 * 1024
_MIN_PREFETCH, _MAX_PREFETCH = 2, 8
"""One is merged while the next is read. Each of an 8B model has about 600 MB."""


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """The result of a slice, and its submission, which stays on the server until `free_shards`."""

    shard: AtlasShard
    submission: Submission


class PrefetchLimit:
    """Two results in memory at a time, and up to eight if so many fit 256 MiB."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_MIN_PREFETCH)
        self._measured = False

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Return a function that waits for a slot at its first call; the slot is free at the end.

        A slice that waits for its worker takes none: results that are ready can be read.
        """
        taken = False

        async def take() -> None:
            nonlocal taken
            if not taken:
                await self._slots.acquire()
                taken = True

        try:
            yield take
        finally:
            if taken:
                self._slots.release()

    def measure(self, size: int) -> None:
        """Set the limit by the first result, in bytes: all of an atlas are of about one size."""
        if self._measured:
            return
        self._measured = True
        for _ in range(min(_MAX_PREFETCH, _PREFETCH_BYTES // max(size, 1)) - _MIN_PREFETCH):
            self._slots.release()


class SliceJobs:
    """Submits slices, and reads their results.

    A killed build leaves slices on the server: queued, running, or done. The next build submits
    them under the same keys, and so reads the results of the first. `identity` is that of the
    folder while it is built, so that folders share no jobs.
    """

    def __init__(
        self,
        connection: Connection,
        identity: str,
        settings: AtlasSettings,
        pins: Pins,
    ) -> None:
        self._connection = connection
        shared = [identity, settings.about(), settings.priority]
        self._shared_key = json.dumps(shared, sort_keys=True)
        self._priority = wire_priority(settings.priority)
        self._pins = pins
        self._limit = PrefetchLimit()

    @asynccontextmanager
    async def build(self, number: int, digest: str, job: Job) -> AsyncIterator[BuiltShard]:
        """Return the result of a slice, of an earlier build's job if that has one.

        It counts against the `PrefetchLimit` until the end of the context. Raises TraceError if
        this build's own job fails.
        """
        jobs, deadline = [job], Deadline(None)
        job.spec.model = await self._pins.route(job.spec.model, deadline)
        for attempt in count():
            content = f"{self._shared_key} {number} {digest} {attempt}"
            key = f"atlas-{hashlib.sha256(content.encode()).hexdigest()}"
            try:
                answer = await submit(self._connection, jobs, deadline, self._priority, key)
            except InvalidArgument as error:
                if is_key_taken(error):
                    # The key belongs to another job, such as for an earlier default model.
                    continue
                raise
            if isinstance(answer, Rejected):
                raise answer.errors[0]
            async with self._limit.slot() as take_slot:
                found = await self._read(answer, jobs, deadline, take_slot)
                if isinstance(found, AtlasShard):
                    yield BuiltShard(found, answer)
                    return
            if not answer.deduplicated:
                raise found
            # The earlier build's job was cancelled, failed, was freed, or has expired.
        raise AssertionError

    async def _read(
        self,
        accepted: Submission,
        jobs: list[Job],
        deadline: Deadline,
        take_slot: Callable[[], Awaitable[None]],
    ) -> AtlasShard | TraceError:
        """Return the result of a slice, or why there is none.

        A slot is taken before more than its first message is read.
        """
        results = stream_results(
            self._connection, accepted, jobs, deadline, throttle=take_slot, acknowledged=False
        )
        try:
            async with aclosing(results):
                result = await anext(results)
        except NotFound as error:
            return error
        if isinstance(result.outcome, AtlasShard):
            self._limit.measure(result.bytes)
            return result.outcome
        assert isinstance(result.outcome, TraceError)
        await acknowledge(self._connection, accepted.id, len(jobs))
        return result.outcome


async def free_shards(connection: Connection, submissions: Iterable[Submission]) -> None:
    await asyncio.gather(
        *(acknowledge(connection, one.id, len(one.job_ids)) for one in submissions)
    )
