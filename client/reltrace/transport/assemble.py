"""Puts the chunks of one job together: traces, generated text, tokens or a part of an atlas."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from reltrace_proto.v1 import types_pb2

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
"""What a job gives: one trace per target, or what else was asked for, or why there is nothing."""

# The largest trace to be expected, all neurons of a 70B model over 2000 tokens, has half of it.
_MAX_TENSOR_BYTES = 16 * 1024**3


@dataclass(slots=True)
class _Tensor:
    """A tensor that is filled, in order, from its pieces."""

    dtype: str
    shape: tuple[int, ...]
    buffer: Array
    filled: int = 0

    @classmethod
    def announced_by(cls, piece: types_pb2.TensorPiece) -> _Tensor:
        dtype = scalar_name(piece.dtype)
        if dtype not in NUMPY_TYPES:
            raise ProtocolError(f"site {piece.site!r}: number format {piece.dtype} is unknown")
        shape = tuple(piece.shape)
        size = math.prod(shape) * NUMPY_TYPES[dtype].itemsize
        if size > _MAX_TENSOR_BYTES:
            raise ProtocolError(f"site {piece.site!r}: a tensor of {size} bytes is announced")
        return cls(dtype, shape, np.empty(size, np.uint8))

    def add(self, piece: types_pb2.TensorPiece) -> None:
        shape, dtype = tuple(piece.shape), scalar_name(piece.dtype)
        if (shape, dtype) != (self.shape, self.dtype):
            raise ProtocolError(
                f"site {piece.site!r}: a piece of shape {shape} and format {dtype} follows one of "
                f"{self.shape} and {self.dtype}"
            )
        data = piece.data  # Every access to the field copies it.
        end = self.filled + len(data)
        if piece.offset != self.filled or end > len(self.buffer):
            raise ProtocolError(
                f"site {piece.site!r}: a piece of {len(data)} bytes at {piece.offset} does not "
                f"follow the {self.filled} bytes of {len(self.buffer)} that are there"
            )
        self.buffer[self.filled : end] = np.frombuffer(data, np.uint8)
        self.filled = end

    def array(self, site: str) -> Array:
        if self.filled != len(self.buffer):
            raise ProtocolError(
                f"site {site!r}: the job ended after {self.filled} of {len(self.buffer)} bytes"
            )
        values: Array = self.buffer.view(NUMPY_TYPES[self.dtype]).reshape(self.shape)
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
            raise ProtocolError(
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
                self._tensors[key] = _Tensor.announced_by(piece)
            self._tensors[key].add(piece)
        if not chunk.HasField("end"):
            return None
        if chunk.end.state != types_pb2.JOB_STATE_SUCCEEDED:
            return from_job_end(chunk.end, self.job.rename, chunk.job_id)
        if self.job.spec.HasField("generation"):
            return self._generation(chunk.end.timings, chunk.job_id)
        if self.job.spec.HasField("corpus"):
            return self._atlas()
        if self.job.spec.tokenize_only:
            return decode.tokens(self._header)
        return self._traces(chunk.end.timings, chunk.job_id)

    def _generation(self, timings: types_pb2.Timings, job_id: str) -> Generation:
        header, generated = self._header, self._generated
        if header is None or generated is None:
            raise ProtocolError("a job succeeded without its generated text")
        prompt = decode.tokens(header)
        if not len(generated.token_ids) == len(generated.tokens) == len(generated.logprobs):
            raise ProtocolError("generated token ids, tokens and logprobs differ in number")
        return Generation(
            text=generated.text,
            tokens=list(generated.tokens),
            token_ids=list(generated.token_ids),
            logprobs=np.array(generated.logprobs, np.float32),
            stopped=generated.stopped,
            prompt_tokens=prompt.tokens,
            prompt_token_ids=prompt.token_ids,
            prompt_text=prompt.text,
            hints=prompt.hints,
            provenance=decode.provenance(header.provenance),
            timings=decode.timings(timings),
            job_id=job_id,
        )

    def _atlas(self) -> AtlasShard:
        header = self._header
        if header is None:
            raise ProtocolError("an atlas came without a header")
        skipped = {}
        for fault in header.skipped:
            number = re.fullmatch(r"corpus\.prompts\[(\d+)\]", fault.field)
            if number is None:
                raise ProtocolError(f"an atlas leaves out {fault.field!r}")
            skipped[int(number[1])] = fault.description
        arrays: Mapping[str, Mapping[str, Array]]
        if self._manifest is None:
            received: dict[str, dict[str, Array]] = {}
            for (_, site, part), tensor in self._tensors.items():
                received.setdefault(site, {})[part] = tensor.array(site)
            arrays = received
        else:
            arrays = StoredArrays(decode.stored_location(self._manifest, self._manifest.tensors))
        return AtlasShard(
            arrays=arrays,
            vocabulary=dict(zip(header.token_ids, header.tokens, strict=True)),
            special=frozenset(header.token_ids[position] for position in header.special_positions),
            skipped=skipped,
            provenance=decode.provenance(header.provenance),
        )

    def _traces(self, timings: types_pb2.Timings, job_id: str) -> list[Trace]:
        header = self._header
        prompt = decode.tokens(header)
        assert header is not None
        if not header.targets or (not self.job.several and len(header.targets) != 1):
            raise ProtocolError(f"a job came back with {len(header.targets)} targets")
        provenance = decode.provenance(header.provenance)
        layers = tuple(header.layers)
        times = decode.timings(timings)
        by_trace = self._arrays(len(header.targets), layers)
        return [
            Trace(
                tokens=list(prompt.tokens),
                token_ids=list(prompt.token_ids),
                text=prompt.text,
                offsets=prompt.offsets,
                turns=prompt.turns,
                hints=prompt.hints,
                special_positions=prompt.special_positions,
                target=decode.resolved_target(target),
                provenance=provenance,
                arrays=arrays,
                id=self.job.id,
                layers=layers,
                timings=times,
                job_id=job_id,
            )
            for target, arrays in zip(header.targets, by_trace, strict=True)
        ]

    def _arrays(
        self, traces: int, layers: tuple[int, ...]
    ) -> Sequence[Mapping[str, Mapping[str, Array]]]:
        """Return the arrays of each trace; those that a manifest names are not read yet."""
        if self._manifest is not None:
            stored: list[list[types_pb2.StoredTensor]] = [[] for _ in range(traces)]
            shapes = [(wire.trace, wire.site, tuple(wire.shape)) for wire in self._manifest.tensors]
            self._check_shapes(shapes, traces, layers)
            for wire in self._manifest.tensors:
                stored[wire.trace].append(wire)
            locations = (decode.stored_location(self._manifest, some) for some in stored)
            return [StoredArrays(location, self.job.sites) for location in locations]
        received: list[dict[str, dict[str, Array]]] = [
            {site: {} for site in self.job.sites} for _ in range(traces)
        ]
        shapes = [(trace, site, t.shape) for (trace, site, _), t in self._tensors.items()]
        self._check_shapes(shapes, traces, layers)
        for (trace, site, part), tensor in self._tensors.items():
            received[trace][site][part] = tensor.array(site)
        return received

    def _check_shapes(
        self,
        shapes: Iterable[tuple[int, str, tuple[int, ...]]],
        traces: int,
        layers: tuple[int, ...],
    ) -> None:
        """Check that the tensors, each of a trace and a site, are all that were asked for."""
        missing = {(trace, site): None for trace in range(traces) for site in self.job.sites}
        for trace, site, shape in shapes:
            if trace >= traces or site not in self.job.sites:
                raise ProtocolError(f"a tensor of trace {trace}, site {site!r} was not asked for")
            if layers and site not in SITES_WITHOUT_LAYERS and shape[:1] != (len(layers),):
                raise ProtocolError(f"site {site!r} does not have {len(layers)} layers")
            missing.pop((trace, site), None)
        for trace, site in missing:
            raise ProtocolError(f"trace {trace} came back without site {site!r}")
