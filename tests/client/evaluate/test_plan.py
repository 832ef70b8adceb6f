"""What is asked of an evaluation, and where the points of its curves are."""

import numpy as np
import pytest
import reltrace
from reltrace._evaluate.plan import Plan
from reltrace._evaluate.scores import on_axis


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
    ],
)
def test_a_plan_that_can_not_be(wrong: dict[str, object], said: str) -> None:
    given = {"rules": ["gradient"], "site": "embed", "points": 10, "seed": 0} | wrong
    with pytest.raises(reltrace.InvalidArgument, match=said):
        Plan.of(**given)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    plan = Plan.of(["gradient"], "embed", np.int64(5), np.uint32(3))
    assert (plan.points, plan.seed) == (5, 3)


@pytest.mark.parametrize(
    ("neurons", "last"), [(1, 1), (2, 1), (64, 32), (8192, 4096), (458_752, 4096)]
)
def test_neurons_are_switched_off_up_to_half_of_them(neurons: int, last: int) -> None:
    at = Plan.of(["gradient"], "neuron", 10, 0).at(neurons)
    assert (at[0], at[-1]) == (0, last)
    assert (np.diff(at) >= 1).all()


def test_points_are_equal_steps_on_the_axis() -> None:
    for site in ("embed", "neuron"):
        at = Plan.of(["gradient"], site, 10, 0).at(100_000)
        axis = on_axis(site, at)
        assert len(axis) == 11
        # Numbers of neurons are whole; one neuron is 1/12 of the axis.
        assert np.abs(np.diff(axis) - 0.1).max() < (1e-12 if site == "embed" else 0.06)
        assert (axis[0], axis[-1]) == (0, 1)
