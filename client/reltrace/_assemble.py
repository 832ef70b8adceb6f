"""From the chunks of one job back to traces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace._errors import ProtocolError, TraceError, from_job_end
from reltrace._origin import Provenance, ResolvedTarget, Timings
from reltrace._request import Job
from reltrace._trace import SITES_WITHOUT_LAYERS, Array, Trace

# No trace is larger: the full neuron trace of a 70B model over 2000 tokens is half of it.
_MAX_TENSOR_BYTES = 16 * 1024**3

_FORMATS: dict[int, np.dtype[Any]] = {
    types_pb2.SCALAR_TYPE_FLOAT32: np.dtype("<f4"),
    # numpy has no bfloat16: its bits, until `_finished` widens them.
    types_pb2.SCALAR_TYPE_BFLOAT16: np.dtype("<u2"),
    types_pb2.SCALAR_TYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.SCALAR_TYPE_INT32: np.dtype("<i4"),
}
_FORMAT_NAMES = {
    types_pb2.SCALAR_TYPE_FLOAT32: "float32",
    types_pb2.SCALAR_TYPE_BFLOAT16: "bfloat16",
    types_pb2.SCALAR_TYPE_FLOAT16: "float16",
    types_pb2.SCALAR_TYPE_INT32: "int32",
}


def format_name(scalar_type: types_pb2.ScalarType.ValueType) -> str:
    """Return the name of a number format of the wire."""
    return _FORMAT_NAMES.get(scalar_type, "unknown")


@dataclass(slots=True)
class _Tensor:
    """A tensor that is being filled, in order, from its pieces."""

    format: types_pb2.ScalarType.ValueType
    shape: tuple[int, ...]
    buffer: Array
    filled: int = 0

    @classmethod
    def for_piece(cls, piece: types_pb2.TensorPiece) -> _Tensor:
        if piece.dtype not in _FORMATS:
            raise ProtocolError(f"site {piece.site!r}: number format {piece.dtype} is unknown")
        shape = tuple(piece.shape)
        size = math.prod(shape) * _FORMATS[piece.dtype].itemsize
        if size > _MAX_TENSOR_BYTES:
            raise ProtocolError(f"site {piece.site!r}: a tensor of {size} bytes is announced")
        return cls(piece.dtype, shape, np.empty(size, np.uint8))

    def add(self, piece: types_pb2.TensorPiece) -> None:
        data = np.frombuffer(piece.data, np.uint8)
        end = self.filled + len(data)
        if (
            piece.offset != self.filled
            or end > len(self.buffer)
            or tuple(piece.shape) != self.shape
            or piece.dtype != self.format
        ):
            raise ProtocolError(
                f"site {piece.site!r}: a piece of {len(data)} bytes at {piece.offset} does not "
                f"follow the {self.filled} bytes of {len(self.buffer)} that are there"
            )
        self.buffer[self.filled : end] = data
        self.filled = end

    def finished(self, site: str) -> Array:
        if self.filled != len(self.buffer):
            raise ProtocolError(
                f"site {site!r}: the job ended after {self.filled} of {len(self.buffer)} bytes"
            )
        values: Array = self.buffer.view(_FORMATS[self.format]).reshape(self.shape)
        if self.format == types_pb2.SCALAR_TYPE_BFLOAT16:
            # bfloat16 is the upper half of a float32: exact.
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values


@dataclass(slots=True)
class Assembler:
    """Collects the chunks of one job.

    Parameters
    ----------
    job : Job
        What was asked for.
    id : str or int or None
        The id that the traces carry.
    """

    job: Job
    id: str | int | None
    chunks: int = 0
    bytes: int = 0
    _header: types_pb2.TraceHeader | None = None
    _tensors: dict[tuple[int, str, str], _Tensor] = field(default_factory=dict)

    def add(self, chunk: types_pb2.ResultChunk) -> list[Trace] | TraceError | None:
        """Take the next chunk.

        Returns
        -------
        list of Trace, TraceError or None
            One trace per target once the job has succeeded, the error once it has failed, None
            while chunks are missing.

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
        for piece in chunk.tensors:
            key = (piece.trace, piece.site, piece.part)
            tensor = self._tensors.get(key)
            if tensor is None:
                tensor = self._tensors[key] = _Tensor.for_piece(piece)
            tensor.add(piece)
            self.bytes += len(piece.data)
        if not chunk.HasField("end"):
            return None
        if chunk.end.state != types_pb2.JOB_STATE_SUCCEEDED:
            return from_job_end(chunk.end, self.job.rename)
        return self._traces(chunk.end.timings)

    def _traces(self, timings: types_pb2.Timings) -> list[Trace]:
        header = self._header
        if header is None:
            raise ProtocolError("a job succeeded without a header")
        if not header.targets or (not self.job.several and len(header.targets) != 1):
            raise ProtocolError(f"a job came back with {len(header.targets)} targets")
        provenance, layers = _provenance(header.provenance), tuple(header.layers)
        by_trace: list[dict[str, dict[str, Array]]] = [
            {site: {} for site in self.job.sites} for _ in header.targets
        ]
        for (trace, site, part), tensor in self._tensors.items():
            if trace >= len(by_trace) or site not in by_trace[trace]:
                raise ProtocolError(f"a tensor of trace {trace}, site {site!r} was not asked for")
            by_trace[trace][site][part] = tensor.finished(site)
        for trace, sites in enumerate(by_trace):
            for site, parts in sites.items():
                if not parts:
                    raise ProtocolError(f"trace {trace} came back without site {site!r}")
                rows = {array.shape[:1] for array in parts.values()}
                if layers and site not in SITES_WITHOUT_LAYERS and rows != {(len(layers),)}:
                    raise ProtocolError(f"site {site!r} does not have {len(layers)} layers")
        return [
            Trace(
                tokens=list(header.tokens),
                token_ids=list(header.token_ids),
                target=_resolved(target),
                provenance=provenance,
                arrays=arrays,
                id=self.id,
                layers=layers,
                timings=_timings(timings),
            )
            for target, arrays in zip(header.targets, by_trace, strict=True)
        ]


def _timings(wire: types_pb2.Timings) -> Timings:
    return Timings(
        queued=wire.queued.ToTimedelta().total_seconds(),
        engine=wire.engine.ToTimedelta().total_seconds(),
    )


def _resolved(target: types_pb2.ResolvedTarget) -> ResolvedTarget:
    contrasted = target.HasField("contrast_id")
    return ResolvedTarget(
        token=target.token,
        token_id=target.token_id,
        logit=target.logit,
        position=target.position,
        contrast=target.contrast if contrasted else None,
        contrast_id=target.contrast_id if contrasted else None,
        logprob=target.logprob,
        continuation_ids=tuple(target.continuation_ids),
    )


def _provenance(wire: types_pb2.Provenance) -> Provenance:
    return Provenance(
        model=wire.model,
        revision=wire.revision,
        rule=wire.rule,
        reduction=wire.reduction,
        dtype=format_name(wire.dtype),
        attention=wire.attention,
        checkpointing=wire.checkpointing,
        device=wire.device,
        versions=dict(wire.versions),
    )
