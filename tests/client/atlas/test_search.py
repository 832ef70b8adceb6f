"""Neurons by what stands in their contexts: against looking at every context."""

from pathlib import Path

import pytest
import reltrace
from hypothesis import given, settings
from hypothesis import strategies as st
from make_atlas import make_atlas
from reltrace.atlas.search import starts_of

PROMPTS = [
    ("We have cats and dogs", "now"), ("the dogs run", "home"), ("a bird sings", "dogs"),
    ("dogs " + "very " * 30 + "far", "off"), ("fish swim", "well"),
]  # fmt: skip
FAR = 31
PLACES = {
    (0, 0): [(0, 4, 1.0), (1, 2, 0.5), (4, 0, 2.0)],
    (0, 1): [(2, 0, 0.7), (1, 0, 0.6), (0, 0, -3.0)],
    (1, 0): [(3, FAR, 5.0)],
    (1, 2): [(4, 1, 1.0)],
}


@pytest.fixture
def atlas(tmp_path: Path) -> reltrace.Atlas:
    return make_atlas(tmp_path, PROMPTS, PLACES)


def found(atlas: reltrace.Atlas, text: str, **how: object) -> list[tuple[object, ...]]:
    matches = atlas.find(text, **how)  # type: ignore[arg-type]
    return [(m.layer, m.index, m.contexts, m.count, m.of) for m in matches]


def test_a_text_is_found_before_at_and_after_the_place(atlas: reltrace.Atlas) -> None:
    """
    Given neurons that are strong at "dogs", after it, where it is explained, before it, and 31
    tokens after it
    I expect the first three, those with more such contexts first, and not the others.
    """
    assert found(atlas, "dogs") == [(0, 0, "relevance+", 2, 3), (0, 1, "relevance+", 1, 2)]
    (first, second) = atlas.find("DOGS")
    assert first.strength == pytest.approx(1.5)
    assert first.strongest is not None
    assert (first.strongest.prompt, first.strongest.position) == (0, 4)
    assert second.strongest is not None
    assert second.strongest.target == " dogs"


def test_a_text_may_run_over_tokens(atlas: reltrace.Atlas) -> None:
    assert found(atlas, "ts and do") == [(0, 0, "relevance+", 1, 3)]
    assert found(atlas, "fish swim") == [(0, 0, "relevance+", 1, 3), (1, 2, "relevance+", 1, 1)]


def test_both_signs_are_searched_but_not_both_measures(atlas: reltrace.Atlas) -> None:
    assert found(atlas, "We ") == [(0, 1, "relevance-", 1, 1), (0, 0, "relevance+", 1, 3)]
    assert found(atlas, "dogs", measure="activation") == []
    assert found(atlas, "dogs", site="head") == []
    assert found(atlas, "dogs", k=1) == [(0, 0, "relevance+", 2, 3)]


def test_labels_that_were_given_come_first(atlas: reltrace.Atlas, tmp_path: Path) -> None:
    source = tmp_path / "labels.jsonl"
    source.write_text('{"layer": 1, "index": 1, "label": "what Dogs do"}\n')
    atlas.import_labels(source)
    first, *others = atlas.find("dogs")
    assert (first.layer, first.index, first.label) == (1, 1, "what Dogs do")
    assert (first.count, first.strongest) == (0, None)
    assert len(others) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": " "}, "text: must not be empty"),
        ({"text": "x", "k": 0}, "k: must be a whole number from 1 on, not 0"),
        ({"text": "x", "site": "embed"}, "site: must be one of neuron, head"),
        ({"text": "x", "measure": "mass"}, "measure: must be one of relevance, activation"),
    ],
)
def test_bad_searches_say_what_is_allowed(
    atlas: reltrace.Atlas, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        atlas.find(**arguments)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.lists(st.sampled_from([" a", " ab", "b", " ba", "ab"]), min_size=1, max_size=8),
    wanted=st.text("ab ", min_size=1, max_size=4),
)
def test_a_text_begins_in_the_token_of_its_first_character(tokens: list[str], wanted: str) -> None:
    # A tokenizer that marks white space, so that words are not put apart.
    tokens = [" x", *tokens]
    owner = [index for index, token in enumerate(tokens) for _ in token]
    text = "".join(tokens)
    starts = [at for at in range(len(text)) if text.startswith(wanted, at)]
    expected = {owner[at] for at in starts}
    assert starts_of(wanted, tokens) == sorted(expected)


WHITE = {
    "LINE": "\n", "WIDE": "\u3000", "FIXED": "\u00a0", "next": "next", "va": "می", "NJ": "\u200c",
    "ta": "خواهم", "JOINED": "👩\u200d🚀", "TAB": "\t",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "neuron"),
    [
        ("end.\nnext", 0), ("END.↵next", 0), ("a\u3000next", 1), ("a next", 1),
        ("b\u00a0next", 2), ("b next", 2), ("b\u3000next", 2),
        ("می\u200cخواهم", 3), ("👩\u200d🚀", 4),
        ("c\tnext", 5), ("→\n", 6),
    ],
)  # fmt: skip
def test_white_space_and_joiners_are_found_as_such(tmp_path: Path, text: str, neuron: int) -> None:
    """
    Given prompts with white space of each kind and joiners
    I expect what a prompt says to be found there, also as it is shown, and nowhere else.
    """
    prompts = [
        ("the end. LINE next", "x"), ("a WIDE next", "x"), ("b FIXED next", "x"),
        ("so va NJ ta", "x"), ("my JOINED", "x"), ("c TAB next", "x"), ("d TAB LINE", "x"),
        ("end. next", "x"),
    ]  # fmt: skip
    places = {(0, neuron): [(neuron, 1, 1.0)] for neuron in range(8)}
    atlas = make_atlas(tmp_path, prompts, places, neurons=8, texts_of=WHITE)
    assert [match.index for match in atlas.find(text)] == [neuron]


@pytest.mark.parametrize(
    ("text", "neurons"),
    [("café", [0, 1]), ("CAFÉ 😀", [1]), ("é", [0, 1, 2]), ("Ã", []), ("ê", [])],
)
def test_characters_over_several_tokens_are_found_whole(
    tmp_path: Path, text: str, neurons: list[int]
) -> None:
    """
    Given prompts of byte-level tokens, of which some hold parts of characters
    I expect a character to be found where it stands, and no part of it.
    """
    texts = {"CAF": "ĠcafÃ", "E": "©", "S1": "ĠðŁ", "S2": "ĺĢ", "LETTER": "ĠÃ©"}
    prompts = [
        ("the CAF E now", "x"), ("my CAF E S1 S2", "x"), ("a LETTER", "x"), ("a CAF S2", "x"),
    ]  # fmt: skip
    places = {(0, neuron): [(neuron, 1, 1.0)] for neuron in range(4)}
    atlas = make_atlas(tmp_path, prompts, places, neurons=4, texts_of=texts)
    assert sorted(match.index for match in atlas.find(text)) == neurons


@pytest.mark.parametrize("text", ["stop\nhere", "stop↵here"])
def test_what_is_explained_and_labels_are_found_by_the_same_rule(tmp_path: Path, text: str) -> None:
    prompts = [("a b", "BREAK"), ("c d", "e")]
    atlas = make_atlas(
        tmp_path, prompts, {(0, 1): [(0, 1, 1.0)]}, texts_of={"BREAK": " Stop\nhere"}
    )
    assert [match.index for match in atlas.find(text)] == [1]
    source = tmp_path / "in.jsonl"
    source.write_text('{"layer": 0, "index": 2, "label": "wide\u3000space"}\n', "utf-8")
    atlas.import_labels(source)
    assert [match.index for match in atlas.find("wide space")] == [2]
