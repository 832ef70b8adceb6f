"""What is evaluated, and where its answer stands."""

from dataclasses import replace

import numpy as np
import pytest
import reltrace
from make_trace import make_trace, with_text
from reltrace import Target
from reltrace.evaluation.prompts import Prompt

TOKENS = ["<s>", " My", " cats", " love", " under", "stand", "ing", " cats"]


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        ("cats", [2]),
        (" cats", [2]),
        ("understanding", [4, 5, 6]),
        ("love under", [3, 4]),
        ([7], [7]),
        ([7, 2, 7, 7], [2, 7]),
        ((np.int64(2), 3), [2, 3]),
        (np.array([3, 2]), [2, 3]),
    ],
)
def test_the_tokens_of_an_answer(answer: object, where: list[int]) -> None:
    prompt = Prompt.of(0, {"prompt": "x", "answer": answer})
    assert prompt.answer_positions(with_text(make_trace(tokens=TOKENS)), len(TOKENS)) == where


# "a 😀\ncats cat", where the face is three tokens, as byte-level vocabularies cut it.
TEXT = "a 😀\ncats cat"
PIECES = ["a", "Ġ", "ð", "ŁĺĢ", "Ċ", "c", "ats", "Ġcat"]
OFFSETS = [(0, 1), (1, 2), (2, 3), (2, 3), (3, 4), (4, 5), (5, 8), (8, 12)]


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        ("😀", [2, 3]),
        # Without the white space before it.
        ("cats", [5, 6]),
        ("\n cats ", [5, 6]),
        # Where it is whole tokens, though its characters come before.
        ("cat", [7]),
        ("😀\ncats", [2, 3, 4, 5, 6]),
    ],
)
def test_a_text_is_found_by_its_characters(answer: str, where: list[int]) -> None:
    trace = replace(make_trace(tokens=PIECES), text=TEXT, offsets=np.array(OFFSETS))
    prompt = Prompt.of(0, {"prompt": "x", "answer": answer})
    assert prompt.answer_positions(trace, len(PIECES)) == where


def test_an_answer_is_of_the_prompt_and_not_of_what_follows() -> None:
    trace = with_text(make_trace(tokens=[*TOKENS, " dogs"]))
    for answer in ("dogs", [8]):
        prompt = Prompt.of(0, {"prompt": "x", "answer": answer})
        with pytest.raises(reltrace.InvalidArgument, match="answer: "):
            prompt.answer_positions(trace, len(TOKENS))


def test_a_text_as_target_is_what_follows_the_prompt() -> None:
    def target(given: object) -> object:
        return Prompt.of(0, {"prompt": "x", "target": given}).item["target"]

    assert target(" Ankara") == Target(continuation=" Ankara")
    assert target(Target(" Ankara", logprob=True)) == Target(continuation=" Ankara", logprob=True)
    # A token, where something is read that no continuation has, or where it is one by its id.
    for same in (
        "max",
        7,
        Target(),
        Target(7),
        Target(" a", position=3),
        Target(" a", contrast=" b"),
        Target(continuation=" a b"),
    ):
        assert target(same) == same


@pytest.mark.parametrize("answer", ["dogs", "cat", "ats", "stand in", [99]])
def test_an_answer_that_is_not_there_is_refused(answer: object) -> None:
    prompt = Prompt.of(0, {"prompt": "x", "answer": answer})
    with pytest.raises(reltrace.InvalidArgument, match="answer: "):
        prompt.answer_positions(with_text(make_trace(tokens=TOKENS)), len(TOKENS))


@pytest.mark.parametrize("answer", ["", [], ()])
def test_an_answer_that_is_empty_is_refused(answer: object) -> None:
    prompt = Prompt.of(0, {"prompt": "x", "answer": answer})
    with pytest.raises(reltrace.InvalidArgument, match="answer: is empty"):
        prompt.answer_positions(with_text(make_trace(tokens=TOKENS)), len(TOKENS))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, r"prompts\[5\]: must be text or a mapping, not int"),
        ({"prompt": "a", "rule": "x"}, r"prompts\[5\]: has 'rule'; allowed: id, prompt, input_ids"),
        ({"prompt": "a", "answer": 3}, r"prompts\[5\]\.answer: must be a text or positions"),
        ({"prompt": "a", "answer": b"cats"}, r"prompts\[5\]\.answer: must be a text or positions"),
        (
            {"prompt": "a", "answer": [0, -1]},
            r"prompts\[5\]\.answer\[1\]: must be a whole number from 0 on, not -1",
        ),
        (
            {"prompt": "a", "answer": [True]},
            r"prompts\[5\]\.answer\[0\]: must be a whole number from 0 on, not True",
        ),
        (
            {"prompt": "a", "answer": np.array([[1]])},
            r"prompts\[5\]\.answer\[0\]: must be a whole number from 0 on, not \[1\]",
        ),
        (
            {"prompt": "a", "id": [1]},
            r"prompts\[5\]\.id: must be text or a whole number, not \[1\]",
        ),
        (
            {"prompt": "a", "id": True},
            r"prompts\[5\]\.id: must be text or a whole number, not True",
        ),
        ({"prompt": "a", "target": [" b"]}, r"prompts\[5\]\.target: must be one, not several"),
        ({"prompt": "a", "target": ""}, r"prompts\[5\]\.target: must not be empty"),
    ],
)
def test_what_is_no_prompt_is_named(given: object, said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        Prompt.of(5, given)
