"""Results that contradict the protocol are errors, never traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import reltrace
from fake_results import LAYERS, chunks_of, relevance_of
from reltrace.transport.assemble import Assembler
from reltrace.types.request import Arguments
from reltrace_proto.v1 import types_pb2

Chunks = list[types_pb2.ResultChunk]
JOB = replace(Arguments("one two three", sites=["resid", "embed"]).job(), id="a")


def assemble(chunks: Chunks) -> list[reltrace.Trace]:
    assembler = Assembler(JOB)
    for chunk in chunks[:-1]:
        assert assembler.add(chunk) is None
    traces = assembler.add(chunks[-1])
    assert isinstance(traces, list)
    return traces


def test_pieces_become_arrays() -> None:
    (trace,) = assemble(chunks_of(JOB.spec, "j", 10))
    expected = relevance_of("<s> one two three", "resid", (LAYERS, 4))
    np.testing.assert_array_equal(trace["resid"], expected)
    trace["resid"][0, 0] = 1  # a caller's own, not a view of a message
    assert trace.id == "a"


def test_the_layers_are_named() -> None:
    chunks = chunks_of(JOB.spec, "j", 10)
    assert assemble(chunks)[0].layers == ()
    chunks = chunks_of(JOB.spec, "j", 10)
    chunks[0].header.layers.extend(range(LAYERS, 0, -1))
    assert assemble(chunks)[0].layers == tuple(range(LAYERS, 0, -1))


def test_layers_that_are_not_the_tensors() -> None:
    chunks = chunks_of(JOB.spec, "j", 10)
    chunks[0].header.layers.extend(range(LAYERS + 1))
    with pytest.raises(reltrace.TraceError, match=f"'resid' does not have {LAYERS + 1} layers"):
        assemble(chunks)


def test_timings_come_in_seconds() -> None:
    chunks = chunks_of(JOB.spec, "j", 10)
    chunks[-1].end.timings.queued.FromMilliseconds(1500)
    chunks[-1].end.timings.engine.FromMicroseconds(20)
    (trace,) = assemble(chunks)
    assert trace.timings == reltrace.Timings(queued=1.5, engine=2e-5)


def drop_a_chunk(chunks: Chunks) -> Chunks:
    return chunks[:2] + chunks[3:]


def repeat_a_chunk(chunks: Chunks) -> Chunks:
    return chunks[:2] + chunks[1:]


def lose_a_piece(chunks: Chunks) -> Chunks:
    del chunks[2].tensors[:]
    return chunks


def lose_the_last_piece(chunks: Chunks) -> Chunks:
    del chunks[-1].tensors[:]
    return chunks


def lose_a_site(chunks: Chunks) -> Chunks:
    for chunk in chunks:
        if chunk.tensors and chunk.tensors[0].site == "embed":
            del chunk.tensors[:]
    return chunks


def lose_the_header(chunks: Chunks) -> Chunks:
    chunks[0].ClearField("header")
    return chunks


def lose_the_targets(chunks: Chunks) -> Chunks:
    del chunks[0].header.targets[:]
    return chunks


def send_another_target(chunks: Chunks) -> Chunks:
    chunks[0].header.targets.add()
    return chunks


def send_another_site(chunks: Chunks) -> Chunks:
    chunks[0].tensors.add(site="head", dtype=types_pb2.SCALAR_TYPE_FLOAT32, shape=[0])
    return chunks


def send_too_much(chunks: Chunks) -> Chunks:
    chunks[0].tensors[0].data += b"x" * 1000
    return chunks


def change_the_shape(chunks: Chunks) -> Chunks:
    chunks[1].tensors[0].shape[:] = [1, 1]
    return chunks


def announce_a_petabyte(chunks: Chunks) -> Chunks:
    chunks[0].tensors[0].shape[:] = [2**25, 2**25]
    return chunks


def use_an_unknown_format(chunks: Chunks) -> Chunks:
    chunks[0].tensors[0].dtype = 99  # type: ignore[assignment]
    return chunks


@pytest.mark.parametrize(
    "spoil",
    [
        drop_a_chunk,
        repeat_a_chunk,
        lose_a_piece,
        lose_the_last_piece,
        lose_a_site,
        lose_the_header,
        lose_the_targets,
        send_another_target,
        send_another_site,
        send_too_much,
        change_the_shape,
        announce_a_petabyte,
        use_an_unknown_format,
    ],
)
def test_a_result_that_is_not_whole_is_an_error(spoil: Callable[[Chunks], Chunks]) -> None:
    with pytest.raises(reltrace.ProtocolError):
        assemble(spoil(chunks_of(JOB.spec, "j", 10)))
