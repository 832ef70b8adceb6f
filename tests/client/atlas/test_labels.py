"""What neurons are called."""

from pathlib import Path

import pytest
import reltrace
from make_atlas import make_atlas

FILLER = [("we eat the pie", "now")] * 200
"""A corpus in which the words of the others are rare."""


@pytest.fixture
def atlas(tmp_path: Path) -> reltrace.Atlas:
    """
    Neuron 0 of layer 1 fires at "cats", after anything; neuron 1 wherever "home" is explained, at a
    different word each time, with "old" somewhere before; neuron 2 at words of all prompts.
    """
    prompts = [
        ("my cats run", "far"), ("the big cats", "sleep"), ("cats", "eat"), ("two cats met", "us"),
        ("old men walk slowly", "home"), ("an old dog ran", "home"), ("old birds fly", "home"),
        ("so old that nobody went", "home"), ("", ""), *FILLER,
    ]  # fmt: skip
    places = {
        (1, 0): [(0, 1, 0.5), (1, 2, 0.75), (2, 0, 1.0), (3, 1, 0.25)],
        (1, 1): [(4, 3, 0.4), (5, 2, 0.3), (6, 2, 0.2), (7, 4, 0.1)],
        (1, 2): [(number, number % 4, 0.1) for number in range(9, 25)],
    }
    return make_atlas(tmp_path, prompts, places)


def test_a_label_is_what_stands_out(atlas: reltrace.Atlas) -> None:
    """
    I expect the word where it fires; what is explained, and what is before; and nothing where
    contexts are as the rest of the corpus is.
    """
    assert atlas.label(1, 0) == "cats"
    assert atlas.label(1, 1) == "→ home · … old"
    assert atlas.label(1, 2) == ""
    assert atlas.label(0, 0) == ""
    feature = atlas.neuron(1, 1)
    assert feature.label == "→ home · … old"
    assert feature.labelled_by == "log-odds"
    assert [(one.token, one.role, one.count, one.of) for one in feature.stands_out] == [
        (" home", "target", 4, 4), (" old", "before", 4, 4),
    ]  # fmt: skip
    assert all(one.score > 3 for one in feature.stands_out)


def test_places_of_one_prompt_are_one_context(tmp_path: Path) -> None:
    """
    Given a neuron that is strong at four words of one prompt
    I expect nothing around these words to stand out: it was seen once.
    """
    prompts = [("odd ones are all around", "here"), *FILLER]
    atlas = make_atlas(tmp_path, prompts, {(0, 0): [(0, at, 1.0 - at / 8) for at in range(4)]})
    assert atlas.neuron(0, 0).stands_out == []
    assert atlas.label(0, 0) == ""


def test_features_know_their_context_and_mass(atlas: reltrace.Atlas) -> None:
    strongest = atlas.neuron(1, 0).contexts["relevance+"][0]
    assert (strongest.token, strongest.target) == (" cats", " eat")
    assert (strongest.relevance, strongest.activation) == (1.0, 10.0)
    assert (strongest.value("relevance"), strongest.value("activation")) == (1.0, 10.0)
    assert strongest.window == range(1)
    assert atlas.neuron(1, 0).mass == pytest.approx(2.5)
    assert [(f.layer, f.index) for f in atlas.by_mass(most=3)] == [(1, 0), (1, 2), (1, 1)]
    assert atlas.mass()[1].tolist() == pytest.approx([2.5, 1.0, 1.6], abs=1e-6)
    assert (atlas.prompts, list(atlas.skipped)) == (208, [8])


def test_steering_is_by_the_activation_of_its_contexts(atlas: reltrace.Atlas) -> None:
    steer = atlas.neuron(1, 0).steer(2)
    assert (steer.layer, steer.neuron, steer.value) == (1, 0, pytest.approx(2 * 6.25))
    with pytest.raises(reltrace.InvalidArgument, match="neuron: 0 of layer 0 has nothing"):
        atlas.neuron(0, 0).steer()
    with pytest.raises(reltrace.InvalidArgument, match="head: 0 of layer 1 has nothing"):
        atlas.head(1, 0).steer()


def test_contexts_of_long_prompts_are_cut(tmp_path: Path) -> None:
    words = " ".join(f"w{number}" for number in range(100))
    atlas = make_atlas(tmp_path, [(words, "end")], {(0, 0): [(0, 50, 1.0), (0, 97, 0.5)]})
    first, second = atlas.neuron(0, 0).contexts["relevance+"]
    assert first.window == range(26, 59)
    assert str(first).startswith("…  w26 w27")
    assert " w49 ⟦w50⟧ w51" in str(first)
    assert str(first).endswith("w58 …")
    assert second.window == range(73, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0), "layer: must be 0 to 1, not 2"),
        ((0, 3), "neuron: must be 0 to 2, not 3"),
        ((0, 0, "resid"), "site: must be one of neuron, head, not 'resid'"),
    ],
)
def test_what_there_is_not_has_no_label(
    atlas: reltrace.Atlas, arguments: tuple[int, int], message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        atlas.label(*arguments)
