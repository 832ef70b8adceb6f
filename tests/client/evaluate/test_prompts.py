"""What is evaluated, and where its answer stands."""

import numpy as np
import pytest
import reltrace
from make_trace import make_trace
from reltrace._evaluate.prompts import Ids, Prompt

TOKENS = ["<s>", "ĠMy", "Ġcats", "Ġlove", "Ġunder", "stand", "ing", "Ġcats"]


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
    assert prompt.where(make_trace(tokens=TOKENS)) == where


@pytest.mark.parametrize("answer", ["dogs", "cat", "ats", "stand in", [99], []])
def test_an_answer_that_is_not_there_is_refused(answer: object) -> None:
    prompt = Prompt.of(0, {"prompt": "x", "answer": answer})
    with pytest.raises(reltrace.InvalidArgument, match="answer: "):
        prompt.where(make_trace(tokens=TOKENS))


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
        (
            {"prompt": "a", "target": reltrace.Target(continuation=" b c")},
            r"prompts\[5\]\.target: of a continuation can not be evaluated",
        ),
    ],
)
def test_what_is_no_prompt_is_named(given: object, said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        Prompt.of(5, given)


def test_an_id_is_one_prompts() -> None:
    ids = Ids()
    for number, given in enumerate([{"id": "a"}, {"id": "1"}, {}, {"id": 1}]):
        ids.add(Prompt.of(number, given))
    with pytest.raises(reltrace.InvalidArgument, match=r"prompts\[4\]\.id: 'a' is that of .*\[0\]"):
        ids.add(Prompt.of(4, {"id": "a"}))
    # As its place, where it is a number.
    ids.add(Prompt.of(5, {"id": 6}))
    with pytest.raises(reltrace.InvalidArgument, match=r"prompts\[6\]\.id: 6 is that of .*\[5\]"):
        ids.add(Prompt.of(6, "text"))
