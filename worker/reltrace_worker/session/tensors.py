"""Tensors as they travel: number formats and raw bytes."""

import torch
from reltrace_proto.v1 import types_pb2

from reltrace_worker.types.errors import InvalidJob, Violation
from reltrace_worker.types.results import SiteTensor

_DTYPES = {
    types_pb2.SCALAR_TYPE_FLOAT32: torch.float32,
    types_pb2.SCALAR_TYPE_BFLOAT16: torch.bfloat16,
    types_pb2.SCALAR_TYPE_FLOAT16: torch.float16,
    types_pb2.SCALAR_TYPE_INT32: torch.int32,
    types_pb2.SCALAR_TYPE_INT64: torch.int64,
}
_SCALAR_TYPES = {dtype: scalar for scalar, dtype in _DTYPES.items()}


def scalar_type(dtype: torch.dtype) -> types_pb2.ScalarType.ValueType:
    return _SCALAR_TYPES[dtype]


def result_dtype(spec: types_pb2.JobSpec) -> torch.dtype:
    """Return the number format in which a job wants its relevance."""
    return _DTYPES[spec.dtype or types_pb2.SCALAR_TYPE_FLOAT32]


def cast(tensor: SiteTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values in the format that the job wants.

    Raises `InvalidJob`: a value is too large for float16.
    """
    if not tensor.values.is_floating_point():
        return tensor.values
    values = tensor.values.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(values).all()):
        largest = float(tensor.values.abs().max())
        what = (
            f"float16 ends at 65504 and site {tensor.site!r} reaches {largest:.3g}; "
            "ask for float32 or bfloat16"
        )
        raise InvalidJob([Violation("dtype", what)])
    return values


def raw_bytes(values: torch.Tensor) -> memoryview:
    """View a CPU tensor as little-endian bytes in row-major order."""
    flat = values.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
