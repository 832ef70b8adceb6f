"""Arrays of traces: sites, and number formats and their names on the wire."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from reltrace_proto.v1 import types_pb2

Array: TypeAlias = NDArray[Any]

# Sites without a layer axis: their relevance exists once, not once per layer.
SITES_WITHOUT_LAYERS = frozenset({"embed"})

# numpy has no bfloat16: its bits are held as uint16 until `widened` converts them to float32.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
_NAMES = {types_pb2.ScalarType.Value(f"SCALAR_TYPE_{name.upper()}"): name for name in NUMPY_TYPES}


def scalar_name(wire: types_pb2.ScalarType.ValueType) -> str:
    """Return the name of a number format of the wire; "unknown" if there is none."""
    return _NAMES.get(wire, "unknown")


def widened(values: Array, dtype: str) -> Array:
    """Return values unchanged; bits of bfloat16 as float32, of which they are the upper half."""
    if dtype != "bfloat16":
        return values
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
