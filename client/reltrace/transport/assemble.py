"""From the chunks of one job back to traces."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace.storage.stored_arrays import Place, StoredArrays, StoredTensor
from reltrace.types.atlas_shard import AtlasPart
from reltrace.types.errors import ProtocolError, TraceError, from_job_end
from reltrace.types.generation import Generation
from reltrace.types.provenance import Candidate, Provenance, ResolvedTarget, Timings
from reltrace.types.request import Job
from reltrace.types.tokens import Tokens, Turn, offsets_of
from reltrace.types.trace import SITES_WITHOUT_LAYERS, Array, Trace

Outcome: TypeAlias = list[Trace] | Generation | Tokens | AtlasPart | TraceError
"""What a job gave."""

# No trace is larger: the full neuron trace of a 70B model over 2000 tokens is half of it.
_MAX_TENSOR_BYTES = 16 * 1024**3

_FORMATS: dict[int, np.dtype[Any]] = {
    types_pb2.SCALAR_TYPE_FLOAT32: np.dtype("<f4"),
    # numpy has no bfloat16: its bits, until `_finished` widens them.
    types_pb2.SCALAR_TYPE_BFLOAT16: np.dtype("<u2"),
    types_pb2.SCALAR_TYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.SCALAR_TYPE_INT32: np.dtype("<i4"),
    types_pb2.SCALAR_TYPE_INT64: np.dtype("<i8"),
}
_FORMAT_NAMES = {
    types_pb2.SCALAR_TYPE_FLOAT32: "float32",
    types_pb2.SCALAR_TYPE_BFLOAT16: "bfloat16",
    types_pb2.SCALAR_TYPE_FLOAT16: "float16",
    types_pb2.SCALAR_TYPE_INT32: "int32",
    types_pb2.SCALAR_TYPE_INT64: "int64",
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
    def from_piece(cls, piece: types_pb2.TensorPiece) -> _Tensor:
        """Begin with a tensor's first piece, for most tensors the only one."""
        if piece.dtype not in _FORMATS:
            raise ProtocolError(f"site {piece.site!r}: number format {piece.dtype} is unknown")
        shape = tuple(piece.shape)
        size = math.prod(shape) * _FORMATS[piece.dtype].itemsize
        if size > _MAX_TENSOR_BYTES:
            raise ProtocolError(f"site {piece.site!r}: a tensor of {size} bytes is announced")
        tensor = cls(piece.dtype, shape, np.empty(size, np.uint8))
        tensor._append(piece)
        return tensor

    def add(self, piece: types_pb2.TensorPiece) -> None:
        """Take the next piece."""
        if tuple(piece.shape) != self.shape or piece.dtype != self.format:
            raise ProtocolError(
                f"site {piece.site!r}: a piece of shape {tuple(piece.shape)} and format "
                f"{format_name(piece.dtype)} follows one of {self.shape} and "
                f"{format_name(self.format)}"
            )
        self._append(piece)

    def _append(self, piece: types_pb2.TensorPiece) -> None:
        # Once: every look at the field copies it.
        data = piece.data
        end = self.filled + len(data)
        if piece.offset != self.filled or end > len(self.buffer):
            raise ProtocolError(
                f"site {piece.site!r}: a piece of {len(data)} bytes at {piece.offset} does not "
                f"follow the {self.filled} bytes of {len(self.buffer)} that are there"
            )
        self.buffer[self.filled : end] = np.frombuffer(data, np.uint8)
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
    _header: types_pb2.TraceHeader | None = None
    _tensors: dict[tuple[int, str, str], _Tensor] = field(default_factory=dict)
    _manifest: types_pb2.Manifest | None = None
    _generated: types_pb2.Generated | None = None

    @property
    def bytes(self) -> int:
        """Size of what has come of the tensors."""
        return sum(tensor.filled for tensor in self._tensors.values())

    def add(self, chunk: types_pb2.ResultChunk) -> Outcome | None:
        """Take the next chunk.

        Returns
        -------
        list of Trace, Generation, Tokens, AtlasPart, TraceError or None
            One trace per target, or what else was asked for, once the job has succeeded, the error
            once it has failed, None while chunks are missing.

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
            tensor = self._tensors.get(key)
            if tensor is None:
                self._tensors[key] = _Tensor.from_piece(piece)
            else:
                tensor.add(piece)
        if not chunk.HasField("end"):
            return None
        if chunk.end.state != types_pb2.JOB_STATE_SUCCEEDED:
            return from_job_end(chunk.end, self.job.rename, chunk.job_id)
        if self.job.spec.HasField("generation"):
            return self._generation(chunk.end.timings, chunk.job_id)
        if self.job.spec.HasField("corpus"):
            return self._atlas()
        if self.job.spec.tokenize_only:
            return _tokens(self._header)
        return self._traces(chunk.end.timings, chunk.job_id)

    def _atlas(self) -> AtlasPart:
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
            found: dict[str, dict[str, Array]] = {}
            for (_, site, part), tensor in self._tensors.items():
                found.setdefault(site, {})[part] = tensor.finished(site)
            arrays = found
        else:
            arrays = StoredArrays(_place(self._manifest, self._manifest.tensors))
        return AtlasPart(
            arrays=arrays,
            vocabulary=dict(zip(header.token_ids, header.tokens, strict=True)),
            special=frozenset(header.token_ids[place] for place in header.special_positions),
            skipped=skipped,
            provenance=_provenance(header.provenance.SerializeToString()),
        )

    def _generation(self, timings: types_pb2.Timings, job_id: str) -> Generation:
        header, written = self._header, self._generated
        if header is None or written is None:
            raise ProtocolError("a job succeeded without what it wrote")
        prompt = _tokens(header)
        if not len(written.token_ids) == len(written.tokens) == len(written.logprobs):
            raise ProtocolError("a text came back with tokens that do not go together")
        return Generation(
            text=written.text,
            tokens=list(written.tokens),
            token_ids=list(written.token_ids),
            logprobs=np.array(written.logprobs, np.float32),
            stopped=written.stopped,
            prompt_tokens=prompt.tokens,
            prompt_token_ids=prompt.token_ids,
            prompt_text=prompt.text,
            hints=prompt.hints,
            provenance=_provenance(header.provenance.SerializeToString()),
            timings=_timings(timings),
            job_id=job_id,
        )

    def _traces(self, timings: types_pb2.Timings, job_id: str) -> list[Trace]:
        header = self._header
        prompt = _tokens(header)
        assert header is not None
        if not header.targets or (not self.job.several and len(header.targets) != 1):
            raise ProtocolError(f"a job came back with {len(header.targets)} targets")
        # Thousands of results in a row have the same origin.
        provenance = _provenance(header.provenance.SerializeToString())
        layers = tuple(header.layers)
        times = _timings(timings)
        arrays = (
            self._received(len(header.targets), layers)
            if self._manifest is None
            else self._stored(self._manifest, len(header.targets), layers)
        )
        return [
            Trace(
                tokens=list(prompt.tokens),
                token_ids=list(prompt.token_ids),
                text=prompt.text,
                offsets=prompt.offsets,
                turns=prompt.turns,
                hints=prompt.hints,
                special_positions=prompt.special_positions,
                target=_resolved(target),
                provenance=provenance,
                arrays=own,
                id=self.id,
                layers=layers,
                timings=times,
                job_id=job_id,
            )
            for target, own in zip(header.targets, arrays, strict=True)
        ]

    def _received(self, traces: int, layers: tuple[int, ...]) -> list[dict[str, dict[str, Array]]]:
        """Return the tensors that came, by trace, site and part."""
        by_trace: list[dict[str, dict[str, Array]]] = [
            {site: {} for site in self.job.sites} for _ in range(traces)
        ]
        for (trace, site, part), tensor in self._tensors.items():
            if trace >= len(by_trace) or site not in by_trace[trace]:
                raise ProtocolError(f"a tensor of trace {trace}, site {site!r} was not asked for")
            by_trace[trace][site][part] = tensor.finished(site)
        for trace, sites in enumerate(by_trace):
            for site, parts in sites.items():
                _check_site(trace, site, [array.shape for array in parts.values()], layers)
        return by_trace

    def _stored(
        self, manifest: types_pb2.Manifest, traces: int, layers: tuple[int, ...]
    ) -> list[StoredArrays]:
        """Return the tensors that a manifest names; they are not read yet."""
        by_trace: list[list[types_pb2.StoredTensor]] = [[] for _ in range(traces)]
        for wire in manifest.tensors:
            if wire.trace >= traces or wire.site not in self.job.sites:
                raise ProtocolError(
                    f"a tensor of trace {wire.trace}, site {wire.site!r} was not asked for"
                )
            by_trace[wire.trace].append(wire)
        for trace, tensors in enumerate(by_trace):
            for site in self.job.sites:
                shapes = [tuple(tensor.shape) for tensor in tensors if tensor.site == site]
                _check_site(trace, site, shapes, layers)
        return [StoredArrays(_place(manifest, tensors), self.job.sites) for tensors in by_trace]


def _place(manifest: types_pb2.Manifest, tensors: Iterable[types_pb2.StoredTensor]) -> Place:
    """Return where some of a manifest's tensors are."""
    return Place(
        manifest.url,
        manifest.offset,
        manifest.length,
        manifest.sha256.hex(),
        tuple(
            StoredTensor(
                wire.site, wire.part, format_name(wire.dtype), tuple(wire.shape), wire.offset
            )
            for wire in tensors
        ),
    )


def _check_site(
    trace: int, site: str, shapes: Sequence[tuple[int, ...]], layers: tuple[int, ...]
) -> None:
    if not shapes:
        raise ProtocolError(f"trace {trace} came back without site {site!r}")
    rows = {shape[:1] for shape in shapes}
    if layers and site not in SITES_WITHOUT_LAYERS and rows != {(len(layers),)}:
        raise ProtocolError(f"site {site!r} does not have {len(layers)} layers")


def _tokens(header: types_pb2.TraceHeader | None) -> Tokens:
    if header is None:
        raise ProtocolError("a job succeeded without a header")
    # A worker of an older version does not say them.
    if len(header.offsets) not in (0, 2 * len(header.tokens)):
        raise ProtocolError(
            f"{len(header.tokens)} tokens came back with {len(header.offsets)} offsets"
        )
    return Tokens(
        token_ids=list(header.token_ids),
        tokens=list(header.tokens),
        offsets=offsets_of(header.offsets),
        text=header.text,
        # Nearly always none, and each generator takes its microseconds.
        turns=tuple(Turn(turn.role, turn.first, turn.stop) for turn in header.turns)
        if header.turns
        else (),
        hints=tuple(header.hints),
        special_positions=tuple(header.special_positions),
    )


def _timings(wire: types_pb2.Timings) -> Timings:
    return Timings(
        queued=wire.queued.seconds + 1e-9 * wire.queued.nanos,
        engine=wire.engine.seconds + 1e-9 * wire.engine.nanos,
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
        candidates=tuple(
            Candidate(one.token, one.token_id, one.logit, one.probability)
            for one in target.candidates
        ),
    )


@lru_cache(maxsize=256)
def _provenance(data: bytes) -> Provenance:
    wire = types_pb2.Provenance.FromString(data)
    return Provenance(
        model=wire.model,
        revision=wire.revision,
        rule=wire.rule,
        reduction=wire.reduction,
        dtype=format_name(wire.dtype),
        attention=wire.attention,
        checkpointing=wire.checkpointing,
        device=wire.device,
        # Shared by all traces that it is the origin of.
        versions=dict(wire.versions),
        rule_functions=wire.rule_functions,
    )
