"""Files of tensors: as the library reads them, and on a disk that is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reltrace.storage.tensor_file import replace_tensors, write_tensors
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
    write_tensors(path, TENSORS, {"about": '{"é": "\\ud800"}'}, durable=True)
    file: Any = safe_open(path, "np")
    with file as content:
        assert content.metadata() == {"about": '{"é": "\\ud800"}'}
        assert sorted(content.keys()) == sorted(TENSORS)
        for name, array in TENSORS.items():
            found = content.get_tensor(name)
            assert (found.dtype.name, found.shape) == (array.dtype.name, array.shape)
            np.testing.assert_array_equal(found, array)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path, unfinished = tmp_path / "a.safetensors", tmp_path / "a.part"
    replace_tensors(path, TENSORS, {}, unfinished)
    before = path.read_bytes()
    # It may be read by whom any new file may.
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    (tmp_path / "new").unlink()
    for size in (1, 1 << 20):
        unfinished.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught:
            replace_tensors(path, {"a": np.zeros(size)}, {}, unfinished)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
