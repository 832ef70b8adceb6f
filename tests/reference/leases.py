"""Leases as a scheduler hands them out, and what a runner gives for them."""

from __future__ import annotations

import asyncio

from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.session.runner import Runner


def lease(
    number: int,
    tokens: int,
    rule: str = "attnlrp",
    priority: types_pb2.Priority = types_pb2.PRIORITY_INTERACTIVE,
    **fields: object,
) -> worker_pb2.Lease:
    ids = types_pb2.TokenIds(ids=range(20, 20 + tokens))
    spec = types_pb2.JobSpec(input_ids=ids, rule=rule, **fields)
    return worker_pb2.Lease(job_id=f"j-{number}", attempt=1, spec=spec, priority=priority)


async def results(runner: Runner) -> list[str]:
    """Wait for the next jobs to end; return the ids of their chunks."""
    async with asyncio.timeout(30):
        while not (found := await runner.next_results()):
            pass  # Some have begun.
    return [chunk.chunk.job_id for chunks in found for chunk in chunks]
