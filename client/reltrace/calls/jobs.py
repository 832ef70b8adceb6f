"""A call of one or a few jobs, answered together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from reltrace.transport.assemble import JobResult, Outcome
from reltrace.transport.connection import Connection
from reltrace.transport.results import stream_results
from reltrace.transport.retry import Deadline
from reltrace.transport.submit import Rejected, submit
from reltrace.types.errors import TraceError
from reltrace.types.request import Job, Priority, wire_priority

# Seconds that the server has to end a stream whose last result was received.
_STREAM_END_TIMEOUT = 5.0


async def run_jobs(
    connection: Connection, jobs: Sequence[Job], priority: Priority, timeout: float | None
) -> list[Outcome]:
    """Submit jobs and return their outcomes, in their order.

    Raises
    ------
    TraceError
        If one of them is rejected or fails.
    """
    deadline = Deadline(timeout)
    answer = await submit(connection, jobs, deadline, wire_priority(priority))
    if isinstance(answer, Rejected):
        raise next(iter(answer.errors.values()))
    outcomes: dict[int, Outcome] = {}
    results = stream_results(connection, answer, jobs, deadline)
    try:
        while len(outcomes) < len(jobs):
            result = await anext(results)
            outcomes[result.index] = result.outcome
            if isinstance(result.outcome, TraceError):
                raise result.outcome
    finally:
        if len(outcomes) == len(jobs):
            # The caller does not wait for the end of the stream and the acknowledgement.
            connection.finish_in_background(_read_to_end(results))
        else:
            await results.aclose()
    return [outcomes[index] for index in range(len(jobs))]


async def _read_to_end(results: AsyncGenerator[JobResult, None]) -> None:
    async with aclosing(results):
        try:
            async with asyncio.timeout(_STREAM_END_TIMEOUT):
                async for _ in results:
                    pass
        except (TraceError, TimeoutError):
            # The caller has the results; unacknowledged, they expire on the server.
            return
