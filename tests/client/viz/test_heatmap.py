"""The heatmap as a picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import reltrace
from make_trace import make_trace
from PIL import Image
from reltrace.viz import colours
from reltrace.viz.heatmap import heatmap


def page_data(path: Path) -> Any:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    assert match
    return json.loads(match.group(1))


def pixels(path: Path) -> np.ndarray:
    """Return the picture as [height, width, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == colour).all(axis=-1).mean())


def test_png_shows_positive_red_and_negative_blue(tmp_path: Path) -> None:
    trace = make_trace({"resid": (2, 5)})
    trace.relevance[0], trace.relevance[1] = 2.0, -3.0
    picture = pixels(trace.plot(tmp_path / "a.png"))
    red, blue = share(picture, (255, 0, 0)), share(picture, (0, 0, 255))
    # Half of the cells each; the colour bar adds a little to both.
    assert red > 0.2
    assert 0.9 < red / blue < 1.1


def test_layers_have_their_numbers(tmp_path: Path) -> None:
    """
    Given a trace of two layers, the higher one first
    If it is drawn
    I expect columns under their numbers, and the text coloured by the lower layer.
    """
    trace = make_trace({"resid": (2, 5)}, layers=(7, 3))
    assert heatmap(trace, "resid", normalize=True).columns == ["7", "3"]
    assert heatmap(make_trace({"resid": (2, 5)}), "resid", normalize=True).columns == ["0", "1"]
    text = colours.token_values(trace)
    assert text.title == "site resid, layer 3"
    np.testing.assert_array_equal(text.values, trace.relevance[1])
    assert page_data(trace.plot(tmp_path / "a.html"))["sites"][0]["columns"] == ["7", "3"]


def test_zero_is_white(tmp_path: Path) -> None:
    trace = make_trace({"resid": (2, 5)})
    trace.relevance[:] = 0
    trace.relevance[0, 0] = -1
    picture = pixels(trace.plot(tmp_path / "a.png", normalize=False))
    # One of ten cells is blue; the other nine are white although nothing is positive.
    assert 0.02 < share(picture, (0, 0, 255)) < 0.1
    assert share(picture, (255, 255, 255)) > 0.7


def test_long_prompts_and_foreign_scripts(tmp_path: Path) -> None:
    tokens = ["猫", "$a_b$", "\x1b[31m"] + [f"Ġw{i}" for i in range(1500)]
    trace = make_trace({"resid": (3, len(tokens))}, tokens=tokens)
    assert pixels(trace.plot(tmp_path / "a.png")).shape[0] <= 6000


def test_thousands_of_tokens_are_drawn_in_rows_that_can_be_seen(tmp_path: Path) -> None:
    """
    Given 4,000 tokens of which two matter
    I expect both to be seen in a picture of some hundred rows, which says what a row is.
    """
    count = 4000
    trace = make_trace({"resid": (3, count)}, tokens=[f"Ġw{at}" for at in range(count)])
    trace.relevance[:] = 1e-4
    trace.relevance[:, 1234], trace.relevance[:, -1] = 1, -1
    table = heatmap(replace(trace, turns=(reltrace.Turn("user", 1000, 4000),)), "resid",
                    normalize=True)  # fmt: skip
    assert table.shown.shape == (118, 3)
    assert table.scale.endswith("; a row has the strongest of 34 tokens, and names it")
    assert table.rows[36] == "1224–1257  w1234"
    assert table.rows[-1] == "3978–3999  w3999"
    assert (table.shown[36] == 1).all()
    assert (table.shown[-1] == -1).all()
    assert [(turn.first, turn.stop) for turn in table.segments] == [(29, 118)]
    picture = pixels(trace.plot(tmp_path / "a.png"))
    one_row = 1 / 118 * 0.4
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert share(picture, colour) > one_row


def test_up_to_600_tokens_have_a_row_each() -> None:
    trace = make_trace({"embed": (600,)}, tokens=[f"Ġw{at}" for at in range(600)])
    trace["embed"][7] = np.nan
    assert heatmap(trace, "embed", normalize=False).shown.shape == (600, 1)
    larger = make_trace({"embed": (601,)}, tokens=[f"Ġw{at}" for at in range(601)])
    larger["embed"][7] = np.nan
    table = heatmap(larger, "embed", normalize=False)
    assert table.shown.shape == (101, 1)
    assert np.isnan(table.shown[1, 0])
