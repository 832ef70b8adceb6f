"""What neurons are called."""

from pathlib import Path

import numpy as np
import pytest
import reltrace
from make_atlas import make_atlas
from safetensors.numpy import save

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
    assert [(one.token, one.role, one.count, one.of) for one in feature.salient_tokens] == [
        (" home", "target", 4, 4), (" old", "before", 4, 4),
    ]  # fmt: skip
    assert all(one.score > 3 for one in feature.salient_tokens)


def test_a_label_says_what_follows(tmp_path: Path) -> None:
    """
    Given an atlas of next tokens, and a neuron that is strong before "home", whatever the word,
    twice in one prompt
    I expect it to be called so, each place to be a context with its own target, and neither first
    words nor special ones to be counted.
    """
    prompts = [
        ("they went home and walk home", ""), ("an old dog ran home", ""),
        ("all birds fly home", ""), ("", ""), ("mark eat mark pie now", ""),
        *[("we eat the pie", "")] * 200,
    ]  # fmt: skip
    places = {(1, 0): [(0, 1, 0.9), (0, 4, 0.8), (1, 3, 0.7), (2, 2, 0.6), (2, 3, 0.1)]}
    atlas = make_atlas(tmp_path, prompts, places, next_tokens=True, special=frozenset({"mark"}))
    neuron = atlas.neuron(1, 0)
    assert neuron.label == "→ home"
    assert [(one.role, one.count, one.of) for one in neuron.salient_tokens] == [("target", 4, 4)]
    contexts = neuron.contexts["relevance+"]
    assert [context.target for context in contexts] == [" home"] * 4 + [""]
    assert (atlas.prompts, atlas.tokens, neuron.count) == (
        204,
        6 + 5 + 4 + 5 + 800,
        5 + 4 + 3 + 3 + 600,
    )
    (found,) = atlas.find("HOME")
    assert (found.layer, found.index, found.count, found.of) == (1, 0, 5, 5)


def test_words_go_before_punctuation(tmp_path: Path) -> None:
    """
    Given a neuron of full stops after "cats", one of full stops, and one of "cats" however it is
    capitalised
    I expect the first to be called by the word first, the second by the full stop, and the third by
    one word.
    """
    prompts = [
        *[(f"a{at} b{at} c{at} d{at} cats .", "now") for at in range(8)],
        *[(f"e{at} f{at} g{at} h{at} i{at} .", "now") for at in range(8)],
        ("Cats are cats", "now"), ("our Cats and cats", "now"), *FILLER,
    ]  # fmt: skip
    places = {
        (0, 0): [(number, 5, 1.0) for number in range(8)],
        (0, 1): [(number, 5, 1.0) for number in range(8, 16)],
        (0, 2): [(16, 0, 1.0), (16, 2, 1.0), (17, 1, 1.0), (17, 3, 1.0)],
    }
    atlas = make_atlas(tmp_path, prompts, places)
    clear = [(one.token, one.role) for one in atlas.neuron(0, 0).salient_tokens]
    assert clear[0] == (" .", "at")
    assert (" cats", "before") in clear
    assert atlas.label(0, 0) == "… cats · ."
    assert atlas.label(0, 1) == "."
    assert atlas.label(0, 2).casefold() == "cats"


def test_places_of_one_prompt_are_one_context(tmp_path: Path) -> None:
    """
    Given a neuron that is strong at four words of one prompt
    I expect nothing around these words to stand out: it was seen once.
    """
    prompts = [("odd ones are all around", "here"), *FILLER]
    atlas = make_atlas(tmp_path, prompts, {(0, 0): [(0, at, 1.0 - at / 8) for at in range(4)]})
    assert atlas.neuron(0, 0).salient_tokens == []
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
    with pytest.raises(
        reltrace.InvalidArgument, match=r'site: .* only a neuron .*Edit\("head", 1, 0, scale'
    ):
        atlas.head(1, 0).steer()
    for times in ("x", True, float("nan")):
        with pytest.raises(reltrace.InvalidArgument, match="times: must be"):
            atlas.neuron(1, 0).steer(times)
    with pytest.raises(reltrace.InvalidArgument, match="share: must be a number from 0 to 1, not"):
        atlas.neuron(1, 0).quantile("x")  # type: ignore[arg-type]


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
        ((2, 0), "layer: must be a whole number from 0 to 1, not 2"),
        ((0, 3), "neuron: must be a whole number from 0 to 2, not 3"),
        ((0, 0, "resid"), "site: must be one of neuron, head, not 'resid'"),
        (("1", 1), "layer: must be a whole number from 0 to 1, not '1'"),
        ((1.0, 1), r"layer: must be a whole number from 0 to 1, not 1\.0"),
        ((1, True), "neuron: must be a whole number from 0 to 2, not True"),
        ((1, None, "head"), "head: must be a whole number from 0 to 2, not None"),
    ],
)
def test_what_there_is_not_has_no_label(
    atlas: reltrace.Atlas, arguments: tuple[int, int], message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        atlas.label(*arguments)
    with pytest.raises(reltrace.InvalidArgument, match=message):
        atlas.feature((*arguments, "neuron")[2], *arguments[:2])


def test_numbers_of_numpy_are_numbers(atlas: reltrace.Atlas) -> None:
    layer, index = np.argwhere(atlas.mass() == atlas.mass().max())[0]
    feature = atlas.neuron(layer, index)
    assert (feature.layer, feature.index) == (1, 0)
    assert type(feature.layer) is int
    assert atlas.prompt(np.int64(2)) == (" cats",)
    with pytest.raises(
        reltrace.InvalidArgument, match="number: must be a whole number from 0 on, not"
    ):
        atlas.prompt("2")  # type: ignore[arg-type]


def test_at_most_so_many_is_one_or_more(atlas: reltrace.Atlas, tmp_path: Path) -> None:
    kept = tmp_path / "labels.jsonl"
    kept.write_text("as it was")
    for most in (0, -1, True, 1.5):
        with pytest.raises(reltrace.InvalidArgument, match="most: must be a whole number from 1"):
            atlas.by_mass(most=most)  # type: ignore[arg-type]
        with pytest.raises(reltrace.InvalidArgument, match="most: must be a whole number from 1"):
            atlas.export_labels(kept, most=most)  # type: ignore[arg-type]
    assert kept.read_text() == "as it was"


def test_an_atlas_says_what_it_is(tmp_path: Path) -> None:
    atlas = make_atlas(tmp_path, [("we <eat>", "pie"), ("", "")], {(1, 2): [(0, 1, 0.5)]})
    assert repr(atlas) == ("Atlas(tiny, 1 prompts, 2 tokens, 2 layers of 3 neurons and 3 heads)")
    labels = tmp_path / "in.jsonl"
    labels.write_text('{"layer": 1, "index": 2, "label": "<script>"}')
    atlas.import_labels(labels)
    shown = atlas._repr_html_()
    assert "<b>tiny</b>: 1 prompts, 2 tokens, 1 prompts left out" in shown
    assert shown.index("&lt;script&gt;") > shown.index("relevance mass")
    assert "<script>" not in shown


def test_a_file_that_is_no_atlas_is_named(tmp_path: Path) -> None:
    """
    Given files in an atlas' place: of other tensors, of nothing, of another version
    I expect each to be told apart.
    """
    file = tmp_path / "atlas.safetensors"
    for content, message in (
        (save({"x": np.zeros(1)}), "is a safetensors file, but holds no atlas"),
        (b"nothing", "atlas.safetensors is damaged: "),
        (save({"x": np.zeros(1)}, {"atlas": '{"format": 2}'}), "is of format 2, .* build it again"),
        (save({"x": np.zeros(1)}, {"atlas": '{"format": 3}'}), "is damaged: 'digests'"),
    ):
        file.write_bytes(content)
        with pytest.raises(reltrace.InvalidArgument, match=message):
            reltrace.load_atlas(tmp_path)
