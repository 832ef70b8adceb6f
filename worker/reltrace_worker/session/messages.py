"""What a worker sends on its stream, as messages."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta

from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.session.leases import Chunks, LeaseKey
from reltrace_worker.session.watchdog import Work

_MESSAGE_BYTES = 1 << 20

Outgoing = asyncio.Queue[worker_pb2.WorkRequest | None]
"""None closes our side of the stream."""


async def requests(outgoing: Outgoing) -> AsyncIterator[worker_pb2.WorkRequest]:
    """Yield what is put into a queue, until it is closed."""
    while (request := await outgoing.get()) is not None:
        yield request


def heartbeat(keys: Iterable[LeaseKey], work: Work | None) -> worker_pb2.WorkRequest:
    """Return a heartbeat for leases, and the progress of the work that is the slowest."""
    beat = worker_pb2.Heartbeat(leases=_refs(keys))
    if work is not None:
        beat.progress.silent.FromTimedelta(timedelta(seconds=work.silent))
        beat.progress.limit.FromTimedelta(timedelta(seconds=work.limit))
    return worker_pb2.WorkRequest(heartbeat=beat)


def release(
    keys: Iterable[LeaseKey], error: types_pb2.JobError | None = None
) -> worker_pb2.WorkRequest:
    return worker_pb2.WorkRequest(release=worker_pb2.Release(leases=_refs(keys), error=error))


def ended(message: worker_pb2.Results) -> set[LeaseKey]:
    """Return the leases that end with a message."""
    return {
        LeaseKey(leased.chunk.job_id, leased.attempt)
        for leased in message.chunks
        if leased.chunk.HasField("end")
    }


def pack_results(results: list[Chunks], held: set[LeaseKey]) -> Iterator[worker_pb2.Results]:
    """Fill messages with the chunks of many jobs; skip jobs whose lease is gone."""
    message, size = worker_pb2.Results(), 0
    for chunks in results:
        for leased in chunks:
            if LeaseKey(leased.chunk.job_id, leased.attempt) not in held:
                break
            length = leased.ByteSize()
            if size and size + length > _MESSAGE_BYTES:
                yield message
                message, size = worker_pb2.Results(), 0
            message.chunks.append(leased)
            size += length
    if size:
        yield message


def _refs(keys: Iterable[LeaseKey]) -> list[worker_pb2.LeaseRef]:
    return [worker_pb2.LeaseRef(job_id=key.job_id, attempt=key.attempt) for key in keys]
