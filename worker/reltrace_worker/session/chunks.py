"""Cuts results into numbered chunks."""

from collections.abc import Iterator, Sequence

import torch
from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.session.convert import raw_bytes, scalar_type
from reltrace_worker.types.results import SiteTensor

CHUNK_BYTES = 1 << 20
"""Bytes of tensor data in one chunk."""


def chunks(
    lease: worker_pb2.Lease,
    header: types_pb2.TraceHeader,
    tensors: Sequence[tuple[SiteTensor, torch.Tensor]],
    timings: types_pb2.Timings,
    generated: types_pb2.Generated | None = None,
) -> Iterator[worker_pb2.LeasedChunk]:
    """Yield the chunks of a job that succeeded, numbered from 1.

    Made one at a time: a large result is never in memory twice.

    Parameters
    ----------
    tensors : sequence of (SiteTensor, torch.Tensor)
        What each tensor is, and its values in the format to send.
    """
    chunk = types_pb2.ResultChunk(job_id=lease.job_id, number=1, header=header, generated=generated)
    room = CHUNK_BYTES
    for tensor, values in tensors:
        data = raw_bytes(values)
        offset = 0
        while offset < len(data) or not data:
            if room == 0:
                yield worker_pb2.LeasedChunk(attempt=lease.attempt, chunk=chunk)
                chunk = types_pb2.ResultChunk(job_id=lease.job_id, number=chunk.number + 1)
                room = CHUNK_BYTES
            piece = data[offset : offset + room]
            chunk.tensors.add(
                trace=tensor.trace,
                site=tensor.site,
                part=tensor.part,
                dtype=scalar_type(values.dtype),
                shape=values.shape,
                offset=offset,
                data=piece.tobytes(),
            )
            offset += len(piece)
            room -= len(piece)
            if not data:
                break
    yield _last(lease, chunk, timings)


def stored_chunk(
    lease: worker_pb2.Lease,
    header: types_pb2.TraceHeader,
    manifest: types_pb2.Manifest,
    timings: types_pb2.Timings,
) -> worker_pb2.LeasedChunk:
    """Return the only chunk of a job that succeeded and whose tensors are in a store."""
    chunk = types_pb2.ResultChunk(job_id=lease.job_id, number=1, header=header, manifest=manifest)
    return _last(lease, chunk, timings)


def _last(
    lease: worker_pb2.Lease, chunk: types_pb2.ResultChunk, timings: types_pb2.Timings
) -> worker_pb2.LeasedChunk:
    chunk.end.CopyFrom(
        types_pb2.JobEnd(
            state=types_pb2.JOB_STATE_SUCCEEDED, attempt=lease.attempt, timings=timings
        )
    )
    return worker_pb2.LeasedChunk(attempt=lease.attempt, chunk=chunk)
