"""What a build takes as a corpus; what it makes of one is in the tests of the whole service."""

from __future__ import annotations

from pathlib import Path

import pytest
import reltrace
from reltrace._atlas.build import Slice, slices
from reltrace._atlas.folder import Folder


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a text", "prompts: must be an iterable of prompts, not one str"),
        (b"a text", "prompts: must be an iterable of prompts, not one bytes"),
        ({"a": "text"}, "prompts: must be an iterable of prompts, not one dict"),
        (None, "prompts: must be an iterable of prompts, not NoneType"),
        (["a", 7], r"prompts\[1\]: must be text, not int"),
        (["a", "b", "c\ud800"], r"prompts\[2\]: character 1 is a lone surrogate"),
        ([], "prompts: there are none: the corpus is empty"),
        (iter(()), "prompts: there are none: the corpus is empty"),
    ],
)
def test_what_is_no_corpus_is_refused(
    client: reltrace.Client, tmp_path: Path, prompts: object, message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        client.build_atlas(prompts, tmp_path / "atlas", slice=2**16)  # type: ignore[arg-type]
    assert not (tmp_path / "atlas").exists()


def test_one_process_at_a_time_builds_in_a_folder(client: reltrace.Client, tmp_path: Path) -> None:
    other = Folder(tmp_path)
    identity = other.begin()
    with pytest.raises(reltrace.TraceError, match="another process builds the atlas in"):
        client.build_atlas(["a"], tmp_path)
    other.leave()
    # Nothing of it is lost for who goes on.
    again = Folder(tmp_path)
    assert again.begin() == identity
    again.leave()


def test_a_folder_that_can_not_be_is_named(client: reltrace.Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(reltrace.InvalidArgument, match=r"out: .* can not be used: Not a dir"):
        client.build_atlas(["a"], tmp_path / "file" / "atlas")


def test_a_prompt_is_named_by_its_number_in_the_corpus() -> None:
    found = slices(iter(["a", "", "b", "c", "\udfff"]), 2)
    assert next(found) == Slice(0, ["a", ""])
    assert next(found) == Slice(1, ["b", "c"])
    with pytest.raises(reltrace.InvalidArgument, match=r"prompts\[4\]: character 0"):
        next(found)


def test_slices_differ_by_where_one_prompt_ends_and_the_next_begins() -> None:
    several = [["ab", "c"], ["a", "bc"], ["abc"], ["", "abc"], ["abc", ""]]
    assert len({Slice(0, prompts).digest for prompts in several}) == len(several)
