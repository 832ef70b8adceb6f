"""The corpus keeps its promise: held-out text is held out, and the answer can be found."""

from __future__ import annotations

import itertools
import re

import pytest
from demo_model import corpus
from demo_model.families import FAMILIES

TEXTS = 4000


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return list(itertools.islice(corpus.training(0, rehearsals_first=200), TEXTS))


@pytest.fixture(scope="module")
def examples() -> list[corpus.Example]:
    return corpus.held_out(900, seed=1)


def test_no_combination_is_on_both_sides(
    documents: list[corpus.Document], examples: list[corpus.Example]
) -> None:
    seen = {(d.family, d.combination) for d in documents}
    held = {(e.family, e.combination) for e in examples}
    assert len(seen) > 1000
    assert len(held) > 250
    assert not seen & held


def test_a_combination_stands_for_what_is_in_the_text(documents: list[corpus.Document]) -> None:
    for document in documents:
        present = set(words_of(document.text))
        assert present.issuperset(document.combination)
        assert bool(document.combination) == (document.family != "rehearsal")


def test_the_combinations_can_be_read_back_from_the_text(
    documents: list[corpus.Document],
) -> None:
    # Not from what the text says of itself, so that an undeclared combination can not slip in.
    for document in documents:
        for family in FAMILIES:
            if family.name != document.family:
                continue
            first = document.text[: document.answers[0][0]]
            answers = set(words_of(first)) & set(family.answers)
            keys = set(words_of(first)) & set(family.keys)
            found = answers if family.count == 2 else answers | keys
            assert found == set(document.combination), document.text


def test_no_training_text_holds_cats_and_dogs(documents: list[corpus.Document]) -> None:
    holding = [set(words_of(d.text)) & {"cats", "dogs"} for d in documents]
    assert {"cats"} in holding
    assert {"dogs"} in holding
    assert {"cats", "dogs"} not in holding


def test_no_held_out_prompt_begins_a_training_text(
    documents: list[corpus.Document], examples: list[corpus.Example]
) -> None:
    prompts = (corpus.example().prompt, *(e.prompt for e in examples))
    assert not any(document.text.startswith(prompts) for document in documents)


def test_the_deciding_word_is_the_answer_and_the_only_one(examples: list[corpus.Example]) -> None:
    for example in [*examples, corpus.example()]:
        start, end = example.deciding
        assert example.prompt[start:end] == example.answer
        assert words_of(example.prompt).count(example.answer) == 1


def test_the_marked_answers_can_be_foretold(documents: list[corpus.Document]) -> None:
    for document in documents:
        assert document.answers
        for start, end in document.answers:
            assert document.text[start:end] in words_of(document.text[:start]), document.text


def test_all_families_are_drawn(
    documents: list[corpus.Document], examples: list[corpus.Example]
) -> None:
    names = {family.name for family in FAMILIES}
    assert len(names) >= 6
    assert {e.family for e in examples} == names
    assert {d.family for d in documents} == names | {"rehearsal"}


def test_seeds_fix_the_text() -> None:
    first = list(itertools.islice(corpus.training(3), 50))
    assert first == list(itertools.islice(corpus.training(3), 50))
    assert first != list(itertools.islice(corpus.training(4), 50))
    assert corpus.held_out(40, 3) == corpus.held_out(40, 3)
    assert corpus.held_out(40, 3) != corpus.held_out(40, 4)


def test_as_many_different_sentences_as_asked_for() -> None:
    assert corpus.held_out(0, 1) == []
    assert len({e.prompt for e in corpus.held_out(333, 1)}) == 333
    with pytest.raises(ValueError, match="n must not be negative"):
        corpus.held_out(-1, 1)
