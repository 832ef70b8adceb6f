"""Translates the messages of a job's result to the types of the SDK."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from reltrace_proto.v1 import types_pb2

from reltrace.storage.stored_arrays import StoredLocation, StoredTensor
from reltrace.types.arrays import scalar_name
from reltrace.types.errors import ProtocolError
from reltrace.types.provenance import Candidate, Provenance, ResolvedTarget, Timings
from reltrace.types.tokens import Tokens, Turn


def tokens(header: types_pb2.TraceHeader | None) -> Tokens:
    if header is None:
        raise ProtocolError("a job succeeded without a header")
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
    """Return where some of a manifest's tensors are stored."""
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
