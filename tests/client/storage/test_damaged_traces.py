"""Whatever a file holds, it is a trace or an error that names it."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import reltrace
from damage import damaged_safetensors, damaged_value, damages, told
from hypothesis import given
from hypothesis import strategies as st
from make_trace import make_trace, with_text
from reltrace.storage import trace_files
from reltrace.storage.stored_arrays import StoredArrays, StoredLocation
from reltrace.types.errors import InvalidArgument, TraceError
from storage.test_stored_arrays import place


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "trace.safetensors"
    return with_text(make_trace(layers=(0, 1, 2))).save(path).read_bytes()


@damages
@given(data=st.data())
def test_a_damaged_file_is_a_trace_or_an_error(
    saved: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data.draw(damaged_safetensors(saved, "trace")))
    with told(InvalidArgument, str(path)):
        trace = reltrace.Trace.load(path)
        assert isinstance(trace.tokens, list)
        assert all(
            isinstance(array, np.ndarray) for array in trace_files.tensors_of(trace).values()
        )


@damages
@given(data=st.data())
def test_a_damaged_location_is_arrays_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    described = asdict(place(tmp_path / "a.safetensors"))
    described |= {"tensors": [dict(tensor) for tensor in described["tensors"]]}
    location = None
    # What reads the file around it names that file.
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        location = StoredLocation.from_json(data.draw(damaged_value(described)))
    if location is not None:
        with told(TraceError):
            for parts in StoredArrays(location).values():
                assert all(isinstance(array, np.ndarray) for array in parts.values())
