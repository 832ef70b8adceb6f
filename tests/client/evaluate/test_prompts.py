"""What is evaluated, and where its answer stands."""

import pytest
import reltrace
from make_trace import make_trace
from reltrace._evaluate.prompts import Prompt
from reltrace._evaluate.run import Plan

TOKENS = ["<s>", "ĠMy", "Ġcats", "Ġlove", "Ġunder", "stand", "ing", "Ġcats"]


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        ("cats", [2]),
        (" cats", [2]),
        ("understanding", [4, 5, 6]),
        ("love under", [3, 4]),
        ([7], [7]),
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
        ({"prompt": "a", "answer": [-1]}, r"prompts\[5\]\.answer: must be a text or positions"),
    ],
)
def test_what_is_no_prompt_is_named(given: object, said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        Prompt.of(5, given)


@pytest.mark.parametrize(
    ("rules", "site", "points", "said"),
    [
        ([], "embed", 10, "rules: must be names"),
        ("attnlrp", "embed", 10, "rules: must be names"),
        (["gradient", "gradient"], "embed", 10, "rules: must be names of rules, each once"),
        (["random"], "embed", 10, "rules: needs one beside random"),
        (["gradient"], "resid", 10, "site: must be one of embed, neuron"),
        (["gradient"], "embed", 0, "points: must be 1 to 100"),
    ],
)
def test_a_plan_that_can_not_be(rules: object, site: str, points: int, said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        Plan.of(rules, site, points, 0)  # type: ignore[arg-type]


def test_neurons_are_switched_off_in_steps_of_equal_ratio() -> None:
    axis = Plan.of(["gradient"], "neuron", 10, 0).axis(100_000)
    assert axis[:2].tolist() == [0, 1]
    assert axis[-1] == 4096
    assert Plan.of(["gradient"], "neuron", 10, 0).axis(64)[-1] == 64
