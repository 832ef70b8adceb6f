"""What is asked of an evaluation, and where the points of its curves are."""

from dataclasses import replace

import numpy as np
import pytest
import reltrace
from make_settings import make_settings
from make_trace import make_trace
from reltrace.evaluation.scores import on_axis


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rules": []}, "rules: must be names"),
        ({"rules": "attnlrp"}, "rules: must be names"),
        ({"rules": None}, "rules: must be names"),
        ({"rules": [3]}, "rules: must be names"),
        ({"rules": ["gradient", "gradient"]}, "rules: must be names of rules, each once"),
        ({"rules": ["random"]}, "rules: needs one beside random"),
        ({"site": "resid"}, "site: must be one of embed, neuron"),
        ({"site": ["embed"]}, "site: must be one of embed, neuron"),
        ({"points": 1}, "points: must be a whole number from 2 to 100, not 1"),
        ({"points": 101}, "points: must be a whole number from 2 to 100, not 101"),
        ({"points": 2.5}, "points: must be a whole number"),
        ({"points": True}, "points: must be a whole number"),
        ({"seed": -1}, "seed: must be a whole number from 0 to"),
        ({"seed": "x"}, "seed: must be a whole number"),
        ({"measure": "log"}, "measure: must be one of logprob, probability, logit, not 'log'"),
        ({"measure": None}, "measure: must be one of"),
        ({"keep": True}, "keep: must be one of special, none, not True"),
        ({"replace": ""}, "replace: must not be empty"),
        ({"replace": None}, "replace: must be zero, mean, or a token's text or id, not None"),
        ({"replace": 1.5}, "replace: must be zero, mean, or a token's text or id, not 1.5"),
        ({"replace": -1}, "replace: must be a whole number from 0"),
        ({"replace": "max"}, "replace: a token whose text is max is given by its id"),
        ({"replace": "mean", "site": "neuron"}, "replace: must be zero where neurons are"),
    ],
)
def test_a_plan_that_can_not_be(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=said):
        make_settings(**wrong)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    found = make_settings(points=np.int64(5), seed=np.uint32(3), replace=np.int32(7))
    assert (found.points, found.seed, found.replace, found.token) == (5, 3, 7, 7)


def test_what_takes_the_place_of_tokens() -> None:
    assert make_settings().token is None
    assert make_settings(replace="mean").token is None
    assert make_settings(replace=" ").token == " "
    assert make_settings(replace=0).token == 0


def test_the_first_token_and_special_ones_are_kept() -> None:
    trace = replace(make_trace(), special_positions=(0, 3))
    assert make_settings().kept(trace) == {0, 3}
    # It stands for the text's beginning, special or not.
    assert make_settings().kept(make_trace()) == {0}
    assert make_settings(keep="none").kept(trace) == set()


@pytest.mark.parametrize(
    ("neurons", "last"), [(1, 1), (2, 1), (64, 32), (8192, 4096), (458_752, 4096)]
)
def test_neurons_are_switched_off_up_to_half_of_them(neurons: int, last: int) -> None:
    at = make_settings(site="neuron").at(neurons)
    assert (at[0], at[-1]) == (0, last)
    assert (np.diff(at) >= 1).all()


def test_points_are_equal_steps_on_the_axis() -> None:
    for site in ("embed", "neuron"):
        at = make_settings(site=site).at(100_000)
        axis = on_axis(site, at)
        assert len(axis) == 11
        # Numbers of neurons are whole; one neuron is 1/12 of the axis.
        assert np.abs(np.diff(axis) - 0.1).max() < (1e-12 if site == "embed" else 0.06)
        assert (axis[0], axis[-1]) == (0, 1)
