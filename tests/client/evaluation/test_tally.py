"""What is added up over prompts, and when it says that it can not be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import reltrace
from make_settings import make_settings
from make_trace import make_trace, with_text
from reltrace.evaluation.curves import Curves
from reltrace.evaluation.prompts import Prompt
from reltrace.evaluation.scores import Mean
from reltrace.evaluation.tally import Tally

RULES = ["gradient", "random"]
TOKENS = ["<s>", " The", " capital", " of", " Peru", " is"]
ANSWER = {"prompt": "x", "answer": "Peru"}


def found(
    value: Callable[[set[int]], float],
    given: object = "x",
    prompts: int = 3,
    spread: float = 0.0,
    **settings: object,
) -> reltrace.Evaluation:
    """Evaluate a model whose target is a function of the tokens that are switched off.

    Of prompts, one after another, `spread` more is lost with the tokens.
    """
    how = make_settings(rules=RULES, points=5, **settings)
    tally = Tally(how)
    for number in range(prompts):
        trace = with_text(make_trace({"embed": (6,)}, tokens=TOKENS))
        # What is relevant is what the function says of each token alone.
        relevance = [value(set()) - value({position}) for position in range(6)]
        trace = replace(trace, arrays={"embed": {"": np.array(relevance, np.float32)}})
        curves = Curves.of(Prompt.of(number, given), {"gradient": trace}, how)
        for off in curves.required():
            curves.record(off, value(set(off)) + number / 100 - number * spread * len(off))
        tally.add(curves)
    return tally.evaluation(("zero", None), {})


def falling(off: set[int]) -> float:
    """The answer counts most, and the others a little."""
    return -3.0 * (4 in off) - 0.1 * len(off)


def test_a_model_that_rests_on_the_answer_is_trusted() -> None:
    for given in ("x", ANSWER):
        score = found(falling, given)
        assert score.warnings == ()
        assert score.prompts == 3
        assert score.rules["gradient"].area.mean > 1
        assert score.rules["gradient"].most.tolist()[:2] == pytest.approx([0.01, -3.09])
    assert score.rules["gradient"].hit == Mean.of([1.0] * 3)


def test_the_first_token_stays() -> None:
    """Which everything rests on, as attention does on the first token of a text."""

    def sink(off: set[int]) -> float:
        return falling(off) - 50.0 * (0 in off)

    kept, gone = found(sink), found(sink, keep="none")
    assert kept.rules["gradient"].most.min() > -4
    assert gone.rules["gradient"].most.min() < -50


def test_a_target_that_rises_as_tokens_go_is_warned_of() -> None:
    (warning,) = found(lambda off: 2.0 * len(off), measure="logit").warnings
    assert warning.startswith("the logit of the target rises as tokens are switched off, in any")
    assert "on the average of the curves and 10.000" in warning
    # In between, and not at the end; and the other way round.
    (warning,) = found(lambda off: 5.0 * (0 < len(off) < 5) - (len(off) == 5)).warnings
    assert "the log-probability" in warning
    assert "at their end" not in warning
    (warning,) = found(lambda off: 1.0 if len(off) == 5 else -float(len(off))).warnings
    assert "(1.000 ± 0.000 at their end)" in warning


def test_a_rise_that_may_be_none_is_not_warned_of() -> None:
    """As of three prompts one rises, one falls and one is in between."""

    def rising(off: set[int]) -> float:
        return 1.0 * len(off)

    assert found(rising, spread=0.9).warnings == ()
    (warning,) = found(rising, spread=0.1).warnings
    assert "rises as tokens are switched off" in warning
    # Of one prompt there is no interval.
    assert len(found(rising, prompts=1).warnings) == 1


def test_an_answer_whose_loss_does_not_matter_is_warned_of() -> None:
    def elsewhere(off: set[int]) -> float:
        return -1.0 * (1 in off) - 0.1 * len(off - {4})

    (warning,) = found(elsewhere, ANSWER).warnings
    assert warning.startswith("without the tokens of the known answer the log-probability of the ")
    assert found(elsewhere).warnings == ()


def test_an_answer_that_is_kept_is_warned_of() -> None:
    given = {"prompt": "x", "answer": [0, 4]}
    (warning,) = found(falling, given).warnings
    assert warning.startswith("of 3 of 3 prompts the answer has tokens that are kept")
    assert found(falling, given, keep="none").warnings == ()


def test_a_probability_is_one() -> None:
    score = found(falling, measure="probability", prompts=1)
    assert score.rules["gradient"].most[0] == 1
    assert score.rules["gradient"].most[-1] == pytest.approx(np.exp(-3.5))


def test_no_prompt_is_no_warning() -> None:
    assert found(falling, prompts=0).warnings == ()
