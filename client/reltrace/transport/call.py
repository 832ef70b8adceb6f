"""A call of a few jobs that are answered together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from reltrace_proto.v1 import types_pb2

from reltrace.transport.assemble import Outcome
from reltrace.transport.connection import Connection, Deadline
from reltrace.transport.submission import Entry, Rejected, deliveries, submit
from reltrace.types.errors import TraceError
from reltrace.types.request import Job


async def outcomes(
    connection: Connection,
    jobs: Sequence[Job],
    priority: types_pb2.Priority.ValueType,
    deadline: Deadline,
) -> list[Outcome]:
    """Hand jobs in and return what they gave, in their order.

    Raises
    ------
    TraceError
        If one of them is refused or fails.
    """
    entries = [Entry(job, None) for job in jobs]
    answer = await submit(connection, entries, deadline, priority)
    if isinstance(answer, Rejected):
        raise next(iter(answer.errors.values()))
    found: dict[int, Outcome] = {}
    async with aclosing(deliveries(connection, answer, entries, deadline)) as stream:
        async for delivery in stream:
            if isinstance(delivery.outcome, TraceError):
                raise delivery.outcome
            found[delivery.index] = delivery.outcome
    return [found[index] for index in range(len(jobs))]
