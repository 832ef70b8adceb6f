"""Whatever the files of an atlas hold, it is read, or an error names them."""

import shutil
from pathlib import Path

import pytest
import reltrace
from damage import damaged_bytes, damaged_json, damaged_safetensors, damages, told
from hypothesis import given
from hypothesis import strategies as st
from make_atlas import MODEL, REVISION, make_atlas
from reltrace.atlas.folder import ATLAS, CORPUS
from reltrace.types.errors import InvalidArgument

PROMPTS = [("my cats run", "far"), ("the big cats", "sleep"), *[("we eat", "pie")] * 6]
PLACES = {(1, 0): [(0, 1, 0.5), (1, 2, 0.75)], (0, 2): [(0, 2, -1.0)]}
LABEL = {
    "site": "neuron", "layer": 1, "index": 0, "label": "cats", "by": "me",
    "made_by": [MODEL, REVISION],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "atlas"
    make_atlas(folder, PROMPTS, PLACES)
    return folder


def look(folder: Path) -> None:
    """Read all of an atlas that its users see."""
    atlas = reltrace.Atlas(folder)
    for layer, index in PLACES:
        feature = atlas.neuron(layer, index)
        assert isinstance(feature.label, str)
        assert all(isinstance(str(context), str) for context in feature.contexts)
    atlas.find("cats")


@damages
@given(data=st.data())
def test_a_damaged_state(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "atlas"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    (folder / ATLAS).write_bytes(
        data.draw(damaged_safetensors((whole / ATLAS).read_bytes(), "atlas"))
    )
    with told(InvalidArgument, str(folder)):
        look(folder)


@damages
@given(data=st.data())
def test_a_damaged_slice(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "atlas"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    file = sorted((folder / CORPUS).iterdir())[0]
    file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    with told(InvalidArgument, str(folder)):
        look(folder)


@damages
@given(data=st.data())
def test_damaged_labels(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b"\n".join(data.draw(damaged_json(LABEL)) for _ in range(2)))
    folder = tmp_path / "atlas"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    with told(InvalidArgument, str(path), "line "):
        reltrace.Atlas(folder).import_labels(path)
    look(folder)
