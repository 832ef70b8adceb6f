"""Translates the messages of a job's result to the types of the SDK."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace.storage.stored_arrays import StoredLocation, StoredTensor
from reltrace.types.arrays import NUMPY_TYPES, Array, scalar_name
from reltrace.types.atlas_shard import AtlasShard
from reltrace.types.errors import ProtocolError
from reltrace.types.generation import Generation
from reltrace.types.provenance import Candidate, Provenance, ResolvedTarget, Timings
from reltrace.types.tokens import Tokens, Turn
from reltrace.types.trace import Trace

# Twice the largest trace to be expected: all neurons of a 70B model for 2000 tokens.
MAX_TENSOR_BYTES = 16 * 1024**3


def traces(
    header: types_pb2.TraceHeader,
    arrays: Sequence[Mapping[str, Mapping[str, Array]]],
    times: types_pb2.Timings,
    job_id: str,
    item_id: str | int | None,
) -> list[Trace]:
    """Return one trace per target of the header, each with its arrays by site and part."""
    prompt = tokens(header)
    computed_by = provenance(header.provenance)
    layers = tuple(header.layers)
    took = timings(times)
    return [
        Trace(
            tokens=list(prompt.tokens),
            token_ids=list(prompt.token_ids),
            text=prompt.text,
            offsets=prompt.offsets,
            turns=prompt.turns,
            hints=prompt.hints,
            special_positions=prompt.special_positions,
            target=resolved_target(target),
            provenance=computed_by,
            arrays=by_site,
            id=item_id,
            layers=layers,
            timings=took,
            job_id=job_id,
        )
        for target, by_site in zip(header.targets, arrays, strict=True)
    ]


def generation(
    header: types_pb2.TraceHeader,
    wire: types_pb2.Generated,
    times: types_pb2.Timings,
    job_id: str,
) -> Generation:
    prompt = tokens(header)
    if not len(wire.token_ids) == len(wire.tokens) == len(wire.logprobs):
        raise ProtocolError("generated token ids, tokens and logprobs differ in number")
    return Generation(
        text=wire.text,
        tokens=list(wire.tokens),
        token_ids=list(wire.token_ids),
        logprobs=np.array(wire.logprobs, np.float32),
        stopped=wire.stopped,
        prompt_tokens=prompt.tokens,
        prompt_token_ids=prompt.token_ids,
        prompt_text=prompt.text,
        hints=prompt.hints,
        provenance=provenance(header.provenance),
        timings=timings(times),
        job_id=job_id,
    )


def atlas_shard(
    header: types_pb2.TraceHeader, arrays: Mapping[str, Mapping[str, Array]]
) -> AtlasShard:
    skipped = {}
    for fault in header.skipped:
        number = re.fullmatch(r"corpus\.prompts\[(\d+)\]", fault.field)
        if number is None:
            raise ProtocolError(f"an atlas leaves out {fault.field!r}")
        skipped[int(number[1])] = fault.description
    return AtlasShard(
        arrays=arrays,
        vocabulary=dict(zip(header.token_ids, header.tokens, strict=True)),
        special=frozenset(header.token_ids[position] for position in header.special_positions),
        skipped=skipped,
        provenance=provenance(header.provenance),
    )


def tokens(header: types_pb2.TraceHeader) -> Tokens:
    # Workers of older versions send no offsets.
    if len(header.offsets) not in (0, 2 * len(header.tokens)):
        raise ProtocolError(
            f"{len(header.tokens)} tokens came back with {len(header.offsets)} offsets"
        )
    return Tokens(
        token_ids=list(header.token_ids),
        tokens=list(header.tokens),
        # Faster than `np.array`, which looks for a type first.
        offsets=np.fromiter(header.offsets, np.int64, len(header.offsets)).reshape(-1, 2),
        text=header.text,
        # Nearly always empty; a generator would take microseconds of every small job.
        turns=tuple(Turn(turn.role, turn.first, turn.stop) for turn in header.turns)
        if header.turns
        else (),
        hints=tuple(header.hints),
        special_positions=tuple(header.special_positions),
    )


def timings(wire: types_pb2.Timings) -> Timings:
    return Timings(
        queued=wire.queued.seconds + 1e-9 * wire.queued.nanos,
        engine=wire.engine.seconds + 1e-9 * wire.engine.nanos,
    )


def resolved_target(wire: types_pb2.ResolvedTarget) -> ResolvedTarget:
    contrasted = wire.HasField("contrast_id")
    return ResolvedTarget(
        token=wire.token,
        token_id=wire.token_id,
        logit=wire.logit,
        position=wire.position,
        contrast=wire.contrast if contrasted else None,
        contrast_id=wire.contrast_id if contrasted else None,
        logprob=wire.logprob,
        continuation_ids=tuple(wire.continuation_ids),
        candidates=tuple(
            Candidate(one.token, one.token_id, one.logit, one.probability)
            for one in wire.candidates
        ),
    )


def provenance(wire: types_pb2.Provenance) -> Provenance:
    # Thousands of results in a row have the same one, which is translated once.
    return _provenance(wire.SerializeToString())


@lru_cache(maxsize=256)
def _provenance(data: bytes) -> Provenance:
    wire = types_pb2.Provenance.FromString(data)
    return Provenance(
        model=wire.model,
        revision=wire.revision,
        rule=wire.rule,
        reduction=wire.reduction,
        dtype=scalar_name(wire.dtype),
        attention=wire.attention,
        checkpointing=wire.checkpointing,
        device=wire.device,
        versions=dict(wire.versions),
        rule_functions=wire.rule_functions,
    )


def stored_location(
    manifest: types_pb2.Manifest, tensors: Iterable[types_pb2.StoredTensor]
) -> StoredLocation:
    """Return where some of a manifest's tensors are stored.

    Raises ProtocolError if its tensors have not as many bytes as it says, or one has too many.
    """
    sizes = [
        math.prod(wire.shape) * NUMPY_TYPES[dtype].itemsize
        for wire in manifest.tensors
        if (dtype := scalar_name(wire.dtype)) in NUMPY_TYPES
    ]
    if (largest := max(sizes, default=0)) > MAX_TENSOR_BYTES:
        raise ProtocolError(f"a manifest has a tensor of {largest} bytes")
    if (size := sum(sizes)) != manifest.length:
        raise ProtocolError(f"a manifest of {size} bytes of tensors says {manifest.length}")
    return StoredLocation(
        manifest.url,
        manifest.offset,
        manifest.length,
        manifest.sha256.hex(),
        tuple(
            StoredTensor(
                wire.site, wire.part, scalar_name(wire.dtype), tuple(wire.shape), wire.offset
            )
            for wire in tensors
        ),
    )
