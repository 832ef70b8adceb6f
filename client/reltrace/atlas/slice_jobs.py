"""Slices on their way to workers and back, under keys by which a later run finds them again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from reltrace.atlas.prefetch import Room
from reltrace.calls.pinning import Pins
from reltrace.transport.connection import Connection
from reltrace.transport.results import acknowledge, stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import Accepted, Rejected, submit
from reltrace.types.atlas_shard import AtlasPart
from reltrace.types.errors import InvalidArgument, NotFound, TraceError
from reltrace.types.request import Job, Priority, wire_priority

_KEY_FIELD = "idempotency_key"


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a slice. It stays on the server until `free`.

    Attributes
    ----------
    part : AtlasPart
        The slice's atlas.
    bytes : int
        Its size.
    accepted : Accepted
        Its submission.
    """

    part: AtlasPart
    bytes: int
    accepted: Accepted


class Sender:
    """Hands slices in, and reads what comes of them.

    A run that is killed leaves slices on the server: queued, being made, or made. The next run
    hands them in under the same keys and reads what the first would have read.

    Parameters
    ----------
    connection : Connection
        The server.
    identity : str
        Of the folder while it is built: no other shares its jobs.
    about : mapping
        The settings.
    priority : {"interactive", "batch"}
        Of all jobs.
    pins : Pins
        Which revision of the model they ask for.
    """

    def __init__(
        self,
        connection: Connection,
        identity: str,
        about: Mapping[str, Any],
        priority: Priority,
        pins: Pins,
    ) -> None:
        self._connection = connection
        self._about = json.dumps([identity, about, priority], sort_keys=True)
        self._priority = wire_priority(priority)
        self._pins = pins
        self._room = Room()

    @asynccontextmanager
    async def made(self, number: int, digest: str, job: Job) -> AsyncIterator[Made]:
        """Give what comes of a slice; of an earlier run's job, where that is of use.

        It has a place in the room that there is for parts until the end of the context.

        Parameters
        ----------
        number : int
            Of the slice.
        digest : str
            Of its prompts.
        job : Job
            To be handed in.

        Raises
        ------
        TraceError
            If a job that is this run's own gives nothing.
        """
        jobs, deadline = [job], Deadline(None)
        job.spec.model = await self._pins.route(job.spec.model, deadline)
        for attempt in count():
            key = self._key(number, digest, attempt)
            try:
                answer = await submit(self._connection, jobs, deadline, self._priority, key)
            except InvalidArgument as error:
                if any(violation.field == _KEY_FIELD for violation in error.violations):
                    # Handed in as another job: for a model that was the default one then, say.
                    continue
                raise
            if isinstance(answer, Rejected):
                raise answer.errors[0]
            async with self._room.place() as take:
                found = await self._read(answer, jobs, deadline, take)
                if isinstance(found, Made):
                    await self._room.measured(found.bytes)
                    yield found
                    return
            if not answer.deduplicated:
                raise found
            # What an earlier run left was cancelled, has failed, was freed, or has expired.
        raise AssertionError

    async def _read(
        self,
        accepted: Accepted,
        jobs: list[Job],
        deadline: Deadline,
        room: Callable[[], Awaitable[None]],
    ) -> Made | TraceError:
        """Return what came of a slice, or why there is nothing.

        It is read past its first message, or out of the store that it is in, once there is room.
        """
        results = stream_results(
            self._connection, accepted, jobs, deadline, throttle=room, acknowledged=False
        )
        try:
            async with aclosing(results):
                result = await anext(results)
        except NotFound as error:
            return error
        if isinstance(result.outcome, AtlasPart):
            return Made(result.outcome, result.bytes, accepted)
        assert isinstance(result.outcome, TraceError)
        await acknowledge(self._connection, accepted)
        return result.outcome

    def _key(self, number: int, digest: str, attempt: int) -> str:
        what = f"{self._about} {number} {digest} {attempt}"
        return f"atlas-{hashlib.sha256(what.encode()).hexdigest()}"


async def free(connection: Connection, made: Iterable[Accepted]) -> None:
    """Free what came of slices on the server: it is kept here."""
    await asyncio.gather(*(acknowledge(connection, accepted) for accepted in made))
