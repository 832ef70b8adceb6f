import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.session import results
from reltrace_worker.session.results import EncodedResult
from reltrace_worker.session.tensors import cast, raw_bytes
from reltrace_worker.types.errors import InvalidJob
from reltrace_worker.types.results import SiteTensor

NUMPY = {
    types_pb2.SCALAR_TYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.SCALAR_TYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.SCALAR_TYPE_INT32: np.dtype("<i4"),
}


def tensor(values: torch.Tensor, trace: int = 0, site: str = "resid") -> SiteTensor:
    return SiteTensor(trace, site, "", values)


def cut(*values: torch.Tensor) -> list[worker_pb2.LeasedChunk]:
    named = [(tensor(v, trace=i), v) for i, v in enumerate(values)]
    header = types_pb2.TraceHeader(tokens=["a"])
    lease = worker_pb2.Lease(job_id="s-0", attempt=3)
    return list(EncodedResult(lease, header, named, types_pb2.Timings()).chunks())


def joined(leased: list[worker_pb2.LeasedChunk]) -> dict[int, np.ndarray]:
    """Put tensors together again from their pieces, as a client does."""
    data: dict[int, bytearray] = {}
    shape: dict[int, tuple] = {}
    for piece in (piece for one in leased for piece in one.chunk.tensors):
        buffer = data.setdefault(piece.trace, bytearray())
        assert piece.offset == len(buffer)
        buffer += piece.data
        shape[piece.trace] = (tuple(piece.shape), NUMPY[piece.dtype])
    return {i: np.frombuffer(data[i], shape[i][1]).reshape(shape[i][0]) for i in data}


def test_a_small_result_is_one_chunk() -> None:
    (leased,) = cut(torch.arange(6.0).reshape(2, 3))
    assert (leased.attempt, leased.chunk.job_id, leased.chunk.number) == (3, "s-0", 1)
    assert leased.chunk.header.tokens == ["a"]
    assert leased.chunk.end.state == types_pb2.JOB_STATE_SUCCEEDED
    assert (joined([leased])[0] == np.arange(6).reshape(2, 3)).all()


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), room=st.integers(4, 64))
def test_pieces_make_the_same_tensors(sizes: list[int], room: int) -> None:
    values = [torch.arange(float(size)) + index for index, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "CHUNK_BYTES", room)
        leased = cut(*values)

    assert [one.chunk.number for one in leased] == list(range(1, len(leased) + 1))
    assert [one.chunk.HasField("header") for one in leased] == [True] + [False] * (len(leased) - 1)
    assert [one.chunk.HasField("end") for one in leased] == [False] * (len(leased) - 1) + [True]
    for one in leased:
        assert sum(len(piece.data) for piece in one.chunk.tensors) <= room
    for index, array in joined(leased).items():
        assert (array == values[index].numpy()).all()


def test_an_empty_tensor_keeps_its_shape() -> None:
    (leased,) = cut(torch.zeros(2, 0))
    assert joined([leased])[0].shape == (2, 0)


def test_formats() -> None:
    values = torch.tensor([1.0, -2.5, 1e-8])
    assert bytes(raw_bytes(cast(tensor(values), torch.float32))) == values.numpy().tobytes()
    half = np.frombuffer(raw_bytes(cast(tensor(values), torch.float16)), "<f2")
    assert (half == values.numpy().astype(np.float16)).all()
    # bfloat16 is the upper half of float32.
    upper = np.frombuffer(raw_bytes(cast(tensor(values), torch.bfloat16)), "<u2")
    rounded = (upper.astype(np.uint32) << 16).view(np.float32)
    assert np.allclose(rounded, values.numpy(), rtol=2**-8)


def test_indices_are_not_cast() -> None:
    indices = torch.tensor([1, 2**30], dtype=torch.int32)
    assert cast(tensor(indices), torch.float16) is indices


def test_what_overflows_float16_is_an_error_not_infinity() -> None:
    with pytest.raises(InvalidJob, match="7e\\+04") as caught:
        cast(tensor(torch.tensor([1.0, -7e4])), torch.float16)
    assert [v.field for v in caught.value.violations] == ["dtype"]


def test_strided_values_are_written_in_row_major_order() -> None:
    values = torch.arange(6.0).reshape(2, 3).T
    assert bytes(raw_bytes(values)) == np.ascontiguousarray(values.numpy()).tobytes()
