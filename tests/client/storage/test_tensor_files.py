"""Files of tensors, as the library reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from reltrace.storage.tensor_files import write_tensors
from safetensors import safe_open

RANDOM = np.random.default_rng(0)
TENSORS = {
    "narrow": np.arange(3, dtype=np.int8),
    "b/odd": RANDOM.random((3, 5), np.float32),
    "a": RANDOM.integers(-(2**40), 2**40, (2, 2)),
    "none": np.zeros((0, 4), np.float32),
    "one": np.float64(2.5).reshape(()),
    "turned": RANDOM.random((4, 3), np.float32).T,
    "big": np.arange(4, dtype=">i4"),
    "half": np.arange(3, dtype=np.float16),
    "flags": np.array([True, False]),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as written:
        write_tensors(written, TENSORS, {"about": '{"é": "\\ud800"}'})
    file: Any = safe_open(path, "np")
    with file as content:
        assert content.metadata() == {"about": '{"é": "\\ud800"}'}
        assert sorted(content.keys()) == sorted(TENSORS)
        for name, array in TENSORS.items():
            found = content.get_tensor(name)
            assert (found.dtype.name, found.shape) == (array.dtype.name, array.shape)
            np.testing.assert_array_equal(found, array)
