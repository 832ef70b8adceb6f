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


def ended(request: worker_pb2.WorkRequest) -> set[LeaseKey]:
    """Return the leases that end with a message of results."""
    return {
        LeaseKey(leased.chunk.job_id, leased.attempt)
        for leased in request.results.chunks
        if leased.chunk.HasField("end")
    }


def pack_results(results: list[Chunks], held: set[LeaseKey]) -> Iterator[worker_pb2.WorkRequest]:
    """Fill messages with the chunks of many jobs; skip jobs whose lease is gone.

    Protobuf serializes a message to tell its size, and also to append it or to give it to another
    by an argument, where `CopyFrom` only copies it.
    """
    request, size = worker_pb2.WorkRequest(), 0
    for chunks in results:
        for leased in chunks:
            if LeaseKey(leased.chunk.job_id, leased.attempt) not in held:
                break
            # A chunk that others follow is as large as a message.
            is_last = leased.chunk.HasField("end")
            length = leased.ByteSize() if is_last else _MESSAGE_BYTES
            if size and size + length > _MESSAGE_BYTES:
                yield request
                request, size = worker_pb2.WorkRequest(), 0
            request.results.chunks.add().CopyFrom(leased)
            size += length
    if size:
        yield request


def _refs(keys: Iterable[LeaseKey]) -> list[worker_pb2.LeaseRef]:
    return [worker_pb2.LeaseRef(job_id=key.job_id, attempt=key.attempt) for key in keys]
