"""The arithmetic of an evaluation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reltrace.evaluation.scores import Mean, area, on_axis, strongest_first, tokens_at


def test_strongest_first_keeps_the_order_of_equals() -> None:
    assert strongest_first(np.array([0.0, 3.0, -1.0, 3.0, 0.0])).tolist() == [1, 3, 0, 4, 2]


@given(st.integers(1, 500), st.integers(1, 100))
def test_a_curve_begins_with_nothing_and_ends_with_everything(tokens: int, points: int) -> None:
    counts = [tokens_at(share, tokens) for share in np.linspace(0, 1, points + 1)]
    assert counts[0] == 0
    assert counts[-1] == tokens
    assert counts == sorted(counts)


def test_the_area_between_two_curves() -> None:
    at = np.array([0.0, 0.5, 1.0])
    falls, stays = np.array([4.0, 0.0, 0.0]), np.array([4.0, 4.0, 0.0])
    # Trapezoids: 1 below the one, 3 below the other.
    assert area(falls, stays, at) == pytest.approx(2.0)
    assert area(stays, falls, at) == pytest.approx(-2.0)
    assert area(stays, stays, at) == 0


def test_an_area_of_neurons_is_that_on_the_axis_of_the_picture() -> None:
    """
    Given a curve that is straight on an axis of log(1 + n), and one that stays
    I expect a triangle, whatever the points.
    """
    for numbers in ([0, 255], [0, 1, 255], [0, 3, 15, 63, 255], range(256)):
        at = np.array(numbers, np.float64)
        axis = on_axis("neuron", at)
        falls, stays = -8 * np.log2(1 + at) / 8, np.zeros(len(at))
        assert area(falls, stays, axis) == pytest.approx(4.0)


def test_a_mean_with_its_interval() -> None:
    found = Mean.of([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.count) == (2.5, 4)
    # The standard error is sqrt(5/3) / 2.
    assert found.margin == pytest.approx(1.959964 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert str(found) == "2.500 ± 1.265"
    assert math.isnan(Mean.of([]).mean)


def test_a_single_value_has_no_interval() -> None:
    found = Mean.of([1.0])
    assert math.isnan(found.margin)
    assert str(found) == "1.000"
