"""Atlases whose files are damaged: they are named, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
from make_atlas import make_atlas
from reltrace.atlas.folder import AtlasFolder
from safetensors import safe_open
from safetensors.numpy import save_file

PROMPTS = [("my cats run", "far"), ("the big cats", "sleep"), ("", ""), ("we eat", "pie")]
PLACES = {(1, 0): [(0, 1, 0.5), (1, 2, 0.75)], (0, 2): [(3, 1, -1.0)]}

Change = Callable[[np.ndarray], None]


def damage(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Change an array of a file in place, or to what is returned."""
    file: Any = safe_open(path, "np")
    with file as content:
        about = content.metadata()
        arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    changed = change(arrays[name])
    save_file(arrays if changed is None else {**arrays, name: changed}, path, about)


def at(place: int | tuple[int, ...], value: int) -> Change:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("token_ids", at(1, 1 << 20), "the atlas has no token 1048576"),
        ("token_ids", at(1, -7), "the atlas has no token -7"),
        # One that counts have room for, and the vocabulary does not know.
        ("token_ids", at(1, 0), "the atlas has no token 0"),
        ("targets", at(3, 1 << 20), "the atlas has no explained token 1048576"),
        ("targets", at(3, -2), "the atlas has no explained token -2"),
        ("lengths", at(0, 4), "its lengths do not go together"),
        ("lengths", at(2, -1), "its lengths do not go together"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda atlas: atlas.prompt(0),
        lambda atlas: atlas.neuron(1, 0),
        lambda atlas: atlas.find("cats"),
    ],
)
def test_a_damaged_file_of_the_corpus_is_named(
    tmp_path: Path,
    name: str,
    change: Change,
    said: str,
    read: Callable[[reltrace.Atlas], object],
) -> None:
    make_atlas(tmp_path, PROMPTS, PLACES)
    path = tmp_path / "corpus" / "000000.safetensors"
    damage(path, name, change)
    atlas = reltrace.load_atlas(tmp_path)
    with pytest.raises(reltrace.InvalidArgument, match=f"atlas: {path} is damaged: {said}"):
        read(atlas)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("neuron/prompts", at((1, 0, 0, 0), 4), "names prompts that the corpus does not have"),
        ("neuron/prompts", at((1, 0, 0, 0), 1 << 60), "names prompts that the corpus does not"),
        ("neuron/prompts", at((1, 0, 0, 0), -1), "tokens without a prompt, or the reverse"),
        ("neuron/prompts", at((1, 0, 0, 0), -2), "has numbers below -1"),
        ("head/tokens", at((1, 0, 0, 0), 3), "tokens without a prompt, or the reverse"),
        ("neuron/tokens", at((1, 0, 0, 0), -9), "has numbers below -1"),
    ],
)
def test_places_that_can_not_be_are_found_when_an_atlas_is_read(
    tmp_path: Path, name: str, change: Change, said: str
) -> None:
    make_atlas(tmp_path, PROMPTS, PLACES)
    path = tmp_path / "atlas.safetensors"
    damage(path, name, change)
    with pytest.raises(
        reltrace.InvalidArgument, match=f"atlas: {path} is damaged: site '.*' .*{said}"
    ):
        reltrace.load_atlas(tmp_path)


def test_a_token_past_the_end_of_its_prompt_is_found_when_it_is_looked_at(tmp_path: Path) -> None:
    make_atlas(tmp_path, PROMPTS, PLACES)
    path = tmp_path / "atlas.safetensors"
    damage(path, "neuron/tokens", at((1, 0, 0, 0), 3))
    damage(path, "neuron/tokens", at((0, 1, 0, 2), 3))
    atlas = reltrace.load_atlas(tmp_path)
    damaged = f"{path} is damaged: prompt {{}} has no token 3"
    with pytest.raises(reltrace.InvalidArgument, match=damaged.format(1)):
        atlas.label(1, 0)
    neuron = atlas.neuron(0, 2)
    with pytest.raises(reltrace.InvalidArgument, match=damaged.format(3)):
        len(neuron.contexts["relevance-"])


def test_counts_of_other_lengths_are_found(tmp_path: Path) -> None:
    make_atlas(tmp_path, PROMPTS, PLACES)
    path = tmp_path / "atlas.safetensors"
    damage(path, "words/targets", lambda counts: counts[:-1])
    with pytest.raises(reltrace.InvalidArgument, match="the counts of tokens differ in length"):
        reltrace.load_atlas(tmp_path)


def test_a_folder_with_other_files_is_not_built_in(tmp_path: Path) -> None:
    folder = AtlasFolder(tmp_path)
    with folder.lock():
        identity = folder.begin_build()
        assert folder.begin_build() == identity, "an interrupted build goes on"
        (tmp_path / "notes.txt").touch()
        with pytest.raises(reltrace.InvalidArgument, match=r"holds 'notes.txt' and no atlas"):
            folder.begin_build()
