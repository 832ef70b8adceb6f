"""Colours, and the value that colours a token."""

from __future__ import annotations

import numpy as np
from make_trace import make_trace
from reltrace.viz import colours


def test_what_colours_the_text() -> None:
    shapes = {"attn_out": (3, 5), "resid": (3, 5), "embed": (5,)}
    trace = make_trace(shapes)
    np.testing.assert_array_equal(colours.token_values(trace).values, trace["embed"])
    del shapes["embed"]
    trace = make_trace(shapes)
    np.testing.assert_array_equal(colours.token_values(trace).values, trace["resid"][0])
    del shapes["resid"]
    trace = make_trace(shapes)
    summed = colours.token_values(trace)
    np.testing.assert_array_equal(summed.values, trace["attn_out"].sum(axis=0))
    assert summed.title == "site attn_out, sum over layers"


def test_colours() -> None:
    assert colours.colour(0) == colours.ZERO
    assert colours.colour(1) == colours.colour(7) == colours.POSITIVE
    assert colours.colour(-1) == colours.NEGATIVE
    assert colours.text_colour(colours.ZERO) == (0, 0, 0)
    assert (
        colours.text_colour(colours.POSITIVE)
        == colours.text_colour(colours.NEGATIVE)
        == (255, 255, 255)
    )
    np.testing.assert_array_equal(colours.scaled(np.zeros(3, np.float32)), 0)
