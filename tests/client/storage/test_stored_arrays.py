"""Tensors that a worker wrote to a store, as a trace finds them."""

import hashlib
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import reltrace
from reltrace.storage.stored_arrays import StoredArrays, StoredLocation, StoredTensor
from reltrace.types.errors import ProtocolError

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)
TOKENS = np.arange(3, dtype=np.int32)


def place(path: Path, *, before: int = 5) -> StoredLocation:
    """Write two tensors behind `before` bytes of others; return where they are."""
    data = VALUES.tobytes() + TOKENS.tobytes()
    path.write_bytes(bytes(before) + data + b"of others")
    return StoredLocation(
        url=path.as_uri(),
        offset=before,
        length=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        tensors=(
            StoredTensor("resid", "", "float32", (3, 4), 0),
            StoredTensor("neuron", "token", "int32", (3,), VALUES.nbytes),
        ),
    )


def test_arrays_are_read_at_the_first_look_and_once(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    arrays = StoredArrays(place(file), ("neuron", "resid"))
    assert list(arrays) == ["neuron", "resid"]
    assert len(arrays) == 2
    assert "embed" not in arrays
    np.testing.assert_array_equal(arrays["resid"][""], VALUES)
    file.unlink()
    np.testing.assert_array_equal(arrays["neuron"]["token"], TOKENS)
    # As those that came over the wire.
    arrays["resid"][""][0] = 1
    with pytest.raises(KeyError):
        arrays["embed"]


def test_what_bfloat16_holds_is_exact(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.0e38], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    file = tmp_path / "b"
    file.write_bytes(bits)
    where = StoredLocation(
        file.as_uri(), 0, len(bits), hashlib.sha256(bits).hexdigest(),
        (StoredTensor("resid", "", "bfloat16", (3,), 0),),
    )  # fmt: skip
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(StoredArrays(where)["resid"][""], expected)


def test_a_place_survives_json_and_pickle(tmp_path: Path) -> None:
    where = place(tmp_path / "a")
    assert StoredLocation.from_json(json.loads(json.dumps(asdict(where)))) == where
    again = pickle.loads(pickle.dumps(StoredArrays(where)))
    np.testing.assert_array_equal(again["resid"][""], VALUES)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_what_is_not_there_any_more_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a"
    arrays = StoredArrays(place(file))
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:20] if damage == "cut" else whole[:6] + b"!" + whole[7:])
    with pytest.raises(reltrace.StoreUnreadable, match=file.as_uri()):
        arrays["resid"]
    # A store that comes back is read.
    file.write_bytes(whole)
    np.testing.assert_array_equal(arrays["resid"][""], VALUES)


def test_no_more_is_read_than_the_store_has() -> None:
    """
    Given a device without end, of which much is to be read
    I expect an error at once, and no memory to be taken.
    """
    tensor = StoredTensor("resid", "", "float32", (1 << 38,), 0)
    where = StoredLocation("file:///dev/zero", 0, 1 << 40, "", (tensor,))
    with pytest.raises(reltrace.StoreUnreadable, match="does not hold"):
        StoredArrays(where)["resid"]


def test_a_store_that_nothing_here_can_reach_says_what_is_missing() -> None:
    tensor = StoredTensor("resid", "", "float32", (1,), 0)
    where = StoredLocation("adl://account/file", 0, 4, "", (tensor,))
    with pytest.raises(reltrace.MissingDependency, match="adl://account/file"):
        StoredArrays(where)["resid"]


def test_a_manifest_that_points_past_its_bytes_is_refused(tmp_path: Path) -> None:
    where = place(tmp_path / "a")
    long = StoredTensor("resid", "", "float32", (100,), 0)
    with pytest.raises(ProtocolError, match="points past"):
        StoredArrays(replace(where, tensors=(long,)))["resid"]
