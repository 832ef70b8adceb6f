"""Assembles the chunks of jobs: traces, generated text, tokens or a shard of an atlas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from reltrace_proto.v1 import trace_pb2, types_pb2

from reltrace.storage.stored_arrays import StoredArrays
from reltrace.transport import decode
from reltrace.transport.status import from_job_end
from reltrace.types.arrays import NUMPY_TYPES, SITES_WITHOUT_LAYERS, Array, scalar_name, widened
from reltrace.types.atlas_shard import AtlasShard
from reltrace.types.errors import ProtocolError, TraceError
from reltrace.types.generation import Generation
from reltrace.types.request import Job
from reltrace.types.tokens import Tokens
from reltrace.types.trace import Trace

Outcome: TypeAlias = list[Trace] | Generation | Tokens | AtlasShard | TraceError
"""The result of a job: one trace per target, another type for other jobs, or an error."""


class OrderError(ProtocolError):
    """A chunk does not follow the one before."""


class _Tensor:
    """A tensor that is filled, in order, from its pieces; the first one announces it."""

    def __init__(self, first: types_pb2.TensorPiece) -> None:
        self.trace, self.site, self.part = first.trace, first.site, first.part
        self.shape, self.dtype = tuple(first.shape), scalar_name(first.dtype)
        if self.dtype not in NUMPY_TYPES:
            raise ProtocolError(f"site {self.site!r}: number format {first.dtype} is unknown")
        size = math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize
        if size > decode.MAX_TENSOR_BYTES:
            raise ProtocolError(f"site {self.site!r}: a tensor of {size} bytes is announced")
        self.filled = 0
        self._buffer = np.empty(size, np.uint8)

    def add(self, piece: types_pb2.TensorPiece) -> None:
        shape, dtype = tuple(piece.shape), scalar_name(piece.dtype)
        if (shape, dtype) != (self.shape, self.dtype):
            raise ProtocolError(
                f"site {self.site!r}: a piece of shape {shape} and format {dtype} follows one of "
                f"{self.shape} and {self.dtype}"
            )
        data = piece.data  # Every access to the field copies it.
        end = self.filled + len(data)
        if piece.offset != self.filled or end > len(self._buffer):
            raise ProtocolError(
                f"site {self.site!r}: a piece of {len(data)} bytes at {piece.offset} does not "
                f"follow the {self.filled} bytes of {len(self._buffer)} that are there"
            )
        self._buffer[self.filled : end] = np.frombuffer(data, np.uint8)
        self.filled = end

    def array(self) -> Array:
        if self.filled != len(self._buffer):
            raise ProtocolError(
                f"site {self.site!r}: the job ended after {self.filled} of "
                f"{len(self._buffer)} bytes"
            )
        values: Array = self._buffer.view(NUMPY_TYPES[self.dtype]).reshape(self.shape)
        return widened(values, self.dtype)


@dataclass(slots=True)
class Assembler:
    """Collects the chunks of one job."""

    job: Job
    chunks: int = 0
    _header: types_pb2.TraceHeader | None = None
    _tensors: dict[tuple[int, str, str], _Tensor] = field(default_factory=dict)
    _manifest: types_pb2.Manifest | None = None
    _generated: types_pb2.Generated | None = None

    @property
    def bytes(self) -> int:
        """Bytes of tensors received so far."""
        return sum(tensor.filled for tensor in self._tensors.values())

    def add(self, chunk: types_pb2.ResultChunk) -> Outcome | None:
        """Take the next chunk; return the outcome if it is the job's last, else None.

        Raises
        ------
        ProtocolError
            If the chunk does not follow the one before, or the result is incomplete.
        """
        if chunk.number != self.chunks + 1:
            raise OrderError(
                f"job {chunk.job_id}: chunk {chunk.number} came after chunk {self.chunks}"
            )
        self.chunks = chunk.number
        if chunk.HasField("header"):
            self._header = chunk.header
        if chunk.HasField("manifest"):
            self._manifest = chunk.manifest
        if chunk.HasField("generated"):
            self._generated = chunk.generated
        for piece in chunk.tensors:
            key = (piece.trace, piece.site, piece.part)
            if key not in self._tensors:
                self._tensors[key] = _Tensor(piece)
            self._tensors[key].add(piece)
        return self._outcome(chunk.end, chunk.job_id) if chunk.HasField("end") else None

    def _outcome(self, end: types_pb2.JobEnd, job_id: str) -> Outcome:
        spec, header = self.job.spec, self._header
        if end.state != types_pb2.JOB_STATE_SUCCEEDED:
            return from_job_end(end, self.job.rename, job_id)
        if header is None:
            raise ProtocolError("a job succeeded without a header")
        if spec.tokenize_only:
            return decode.tokens(header)
        if spec.HasField("generation"):
            if self._generated is None:
                raise ProtocolError("a job succeeded without its generated text")
            return decode.generation(header, self._generated, end.timings, job_id)
        if spec.HasField("corpus"):
            return decode.atlas_shard(header, self._atlas_arrays())
        targets = len(header.targets)
        if not targets or (not self.job.several and targets != 1):
            raise ProtocolError(f"a job came back with {targets} targets")
        arrays = self._arrays(targets, tuple(header.layers))
        return decode.traces(header, arrays, end.timings, job_id, self.job.id)

    def _atlas_arrays(self) -> Mapping[str, Mapping[str, Array]]:
        if self._manifest is None:
            return _by_site(self._tensors.values())
        return StoredArrays(decode.stored_location(self._manifest, self._manifest.tensors))

    def _arrays(
        self, traces: int, layers: tuple[int, ...]
    ) -> Sequence[Mapping[str, Mapping[str, Array]]]:
        """Return the arrays of each trace; those that a manifest names are not read yet."""
        sites, manifest = tuple(self.job.spec.sites), self._manifest
        if manifest is None:
            _check_tensors(self._tensors.values(), traces, sites, layers)
            sent: list[list[_Tensor]] = [[] for _ in range(traces)]
            for tensor in self._tensors.values():
                sent[tensor.trace].append(tensor)
            return [_by_site(tensors, sites) for tensors in sent]
        _check_tensors(manifest.tensors, traces, sites, layers)
        stored: list[list[types_pb2.StoredTensor]] = [[] for _ in range(traces)]
        for wire in manifest.tensors:
            stored[wire.trace].append(wire)
        return [
            StoredArrays(decode.stored_location(manifest, tensors), sites) for tensors in stored
        ]


def _check_tensors(
    tensors: Iterable[_Tensor | types_pb2.StoredTensor],
    traces: int,
    sites: tuple[str, ...],
    layers: tuple[int, ...],
) -> None:
    """Check that the tensors are those of every trace and site that was asked for."""
    missing = {(trace, site): None for trace in range(traces) for site in sites}
    for tensor in tensors:
        trace, site = tensor.trace, tensor.site
        if trace >= traces or site not in sites:
            raise ProtocolError(f"a tensor of trace {trace}, site {site!r} was not asked for")
        layered = bool(layers) and site not in SITES_WITHOUT_LAYERS
        if layered and tuple(tensor.shape[:1]) != (len(layers),):
            raise ProtocolError(f"site {site!r} does not have {len(layers)} layers")
        missing.pop((trace, site), None)
    for trace, site in missing:
        raise ProtocolError(f"trace {trace} came back without site {site!r}")


def _by_site(tensors: Iterable[_Tensor], sites: Iterable[str] = ()) -> dict[str, dict[str, Array]]:
    """Return arrays by site, in the order of `sites`, and part."""
    arrays: dict[str, dict[str, Array]] = {site: {} for site in sites}
    for tensor in tensors:
        arrays.setdefault(tensor.site, {})[tensor.part] = tensor.array()
    return arrays


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job that ended: its index in the submission, its outcome, and the bytes of its tensors."""

    index: int
    outcome: Outcome
    bytes: int


class ResultCursor:
    """The position in the results of a submission, and the job that is being received.

    Attributes
    ----------
    last_entry : int
        Number of the last entry of the stream that was received completely.
    """

    def __init__(self, job_ids: Sequence[str], jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.restart({job_id: index for index, job_id in enumerate(job_ids)})

    def restart(self, positions: Mapping[str, int]) -> None:
        """Go on with another submission, of the jobs with these indices, by id."""
        self._positions = dict(positions)
        self._received: set[str] = set()
        self._entries = len(positions)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the start of the stream: what was received is passed over."""
        self.last_entry = 0
        self.drop_chunks()

    def drop_chunks(self) -> None:
        """Forget the chunks of an entry that was not received completely."""
        self._current: Assembler | None = None
        self._current_id = ""

    def drop(self, index: int) -> None:
        """Expect no result of a job."""
        self._positions = {name: at for name, at in self._positions.items() if at != index}

    @property
    def chunks_seen(self) -> int:
        """Number of chunks that were received of the entry after the last one."""
        return 0 if self._current is None else self._current.chunks

    @property
    def has_gaps(self) -> bool:
        """Whether entries up to the last one may hold results that were not received."""
        return self.last_entry > len(self._received)

    @property
    def is_complete(self) -> bool:
        """Whether all results were received, and the stream goes on: with jobs that ran again."""
        return not self._positions and self.last_entry < self._entries

    @property
    def unfinished(self) -> list[str]:
        """Ids of the jobs that have not ended."""
        return list(self._positions)

    @property
    def missing(self) -> list[int]:
        """Indices of these jobs."""
        return sorted(self._positions.values())

    def index_of(self, job_id: str) -> int | None:
        """Return the index of a job in the submission, or None if it has ended."""
        return self._positions.get(job_id)

    def take(self, event: trace_pb2.ResultEvent) -> JobResult | None:
        """Take the next chunk; return the result of the job that ends with it.

        Raises
        ------
        OrderError
            If it is not the next one: the server reads from another place than was asked for.
        ProtocolError
            If it is no result that was asked for.
        """
        chunk = event.chunk
        if chunk.job_id in self._received and event.entry > self.last_entry:
            # A server whose store has lost the job's end had it run again.
            if chunk.HasField("end"):
                self.last_entry = event.entry
            return None
        index = self._positions.get(chunk.job_id)
        if index is None or event.entry <= self.last_entry:
            raise ProtocolError(
                f"entry {event.entry} has results of job {chunk.job_id!r}, which were not asked for"
            )
        if self._current is None:
            self._current = Assembler(self._jobs[index])
            self._current_id = chunk.job_id
        elif self._current_id != chunk.job_id:
            raise OrderError(f"chunks of job {chunk.job_id!r} came inside another entry")
        outcome = self._current.add(chunk)
        if outcome is None:
            return None
        size = self._current.bytes
        self.drop_chunks()
        self.last_entry = event.entry
        del self._positions[chunk.job_id]
        self._received.add(chunk.job_id)
        return JobResult(index, outcome, size)
