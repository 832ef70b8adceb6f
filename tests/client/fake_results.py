"""What `fake_server` answers: a function of the prompt, so that a test can say what must come."""

from __future__ import annotations

import zlib

import numpy as np
from reltrace_proto.v1 import types_pb2

LAYERS = 4
HIDDEN = 6
CANDIDATES = [
    types_pb2.Candidate(token_id=7, token="dogs", logit=3.5, probability=0.75),
    types_pb2.Candidate(token_id=8, token="cats", logit=1.5, probability=0.125),
]
NUMPY = {
    types_pb2.SCALAR_TYPE_UNSPECIFIED: "<f4",
    types_pb2.SCALAR_TYPE_FLOAT32: "<f4",
    types_pb2.SCALAR_TYPE_FLOAT16: "<f2",
}


def tokens_of(spec: types_pb2.JobSpec) -> list[str]:
    if spec.WhichOneof("input") == "input_ids":
        return [f"<{number}>" for number in spec.input_ids.ids]
    if spec.WhichOneof("input") == "chat":
        turns = [[f"<{one.role}>", *one.content.split()] for one in spec.chat.messages]
        return [token for turn in turns for token in turn]
    bos = ["<s>"] if not spec.HasField("add_special_tokens") or spec.add_special_tokens else []
    return [*bos, *spec.prompt.split()]


def read_of(spec: types_pb2.JobSpec) -> types_pb2.TraceHeader:
    """Return how the prompt was read: its tokens, with a space between them."""
    tokens = tokens_of(spec)
    header = types_pb2.TraceHeader(
        tokens=tokens, token_ids=range(len(tokens)), text=" ".join(tokens)
    )
    stop = -1
    for position, token in enumerate(tokens):
        first, stop = stop + 1, stop + 1 + len(token)
        header.offsets.extend((first, stop))
        if token.startswith("<"):
            header.special_positions.append(position)
    if spec.WhichOneof("input") == "chat":
        first = 0
        for message in spec.chat.messages:
            count = len(message.content.split())
            header.turns.add(role=message.role, first=first + 1, stop=first + 1 + count)
            first += 1 + count
        header.hints.append("the conversation was read by a fake template")
    return header


def relevance_of(text: str, site: str, shape: tuple[int, ...], trace: int = 0) -> np.ndarray:
    seed = zlib.crc32(f"{text}|{site}|{trace}".encode())
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


def shape_of(spec: types_pb2.JobSpec, site: str) -> tuple[int, ...]:
    tokens = len(tokens_of(spec))
    shapes = {
        "token": (LAYERS, tokens),
        "feature": (LAYERS, HIDDEN),
        "full": (LAYERS, tokens, HIDDEN),
    }
    shape = shapes[spec.reduction or "token"]
    return shape[1:] if site == "embed" else shape


def encode(values: np.ndarray, dtype: int) -> bytes:
    if dtype == types_pb2.SCALAR_TYPE_BFLOAT16:
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(NUMPY[dtype]).tobytes()


def chunks_of(
    spec: types_pb2.JobSpec, job_id: str, piece_bytes: int
) -> list[types_pb2.ResultChunk]:
    """Return the result of a job that succeeds, cut into pieces of at most `piece_bytes`."""
    text = " ".join(tokens_of(spec))
    dtype = spec.dtype or types_pb2.SCALAR_TYPE_FLOAT32
    header = read_of(spec)
    header.provenance.CopyFrom(
        types_pb2.Provenance(
            model=spec.model.partition("@")[0] or "fake",
            revision="r1",
            rule=spec.rule,
            dtype=types_pb2.SCALAR_TYPE_FLOAT32,
            attention="sdpa",
            device="cpu",
            reduction=spec.reduction,
            versions={"lxt": "2.1", "torch": "2.13.0"},
        )
    )
    for index, target in enumerate(spec.targets):
        count = len(target.continuation.ids.ids) if target.continuation.each else 1
        for part in range(count):
            header.targets.add(
                token=target.token.text or "dogs",
                token_id=7 + index,
                # It falls as tokens are taken away.
                logit=3.5 + part - sum(len(edit.positions) for edit in spec.edits),
                position=len(header.tokens) - 1,
                logprob=target.logprob,
                candidates=CANDIDATES,
                contrast_id=target.contrast.id if target.HasField("contrast") else None,
            )
    pieces = []
    for trace in range(len(header.targets)):
        for site in spec.sites:
            shape = shape_of(spec, site)
            data = encode(relevance_of(text, site, shape, trace), dtype)
            pieces += [
                types_pb2.TensorPiece(
                    trace=trace, site=site, dtype=dtype, shape=shape, offset=offset,
                    data=data[offset : offset + piece_bytes],
                )
                for offset in range(0, len(data), piece_bytes)
            ]  # fmt: skip
    per_chunk = len(pieces) if piece_bytes >= 1024 else 1
    chunks = [
        types_pb2.ResultChunk(tensors=pieces[start : start + per_chunk])
        # A job without a site has a chunk all the same.
        for start in range(0, max(len(pieces), 1), max(per_chunk, 1))
    ]
    chunks[0].header.CopyFrom(header)
    chunks[-1].end.state = types_pb2.JOB_STATE_SUCCEEDED
    chunks[-1].end.attempt = 1
    for number, chunk in enumerate(chunks, start=1):
        chunk.job_id = job_id
        chunk.number = number
    return chunks


def failed_chunk(
    job_id: str, state: int, code: int, message: str, field: str = ""
) -> types_pb2.ResultChunk:
    chunk = types_pb2.ResultChunk(job_id=job_id, number=1)
    chunk.end.state = state
    chunk.end.error.code = code
    chunk.end.error.message = message
    if field:
        chunk.end.error.violations.add(field=field, description=message)
    return chunk
