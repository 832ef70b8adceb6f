"""Pictures: the heatmap as PNG and as a page, the tokens in a terminal."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
from make_trace import make_trace
from PIL import Image
from reltrace.viz import colours, terminal
from reltrace.viz.heatmap import heatmap
from rich.console import Console


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
    text = colours.token_values(trace, "resid")
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


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "html", "HTML"])
def test_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    path = make_trace({"embed": (5,)}).plot(tmp_path / f"a.{ending}")
    assert path.stat().st_size > 1000


def test_another_ending_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        reltrace.InvalidArgument, match=r"must end in \.png, \.svg, \.pdf or \.html"
    ):
        make_trace().plot(tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_long_prompts_and_foreign_scripts(tmp_path: Path) -> None:
    tokens = ["猫", "$a_b$", "\x1b[31m"] + [f"Ġw{i}" for i in range(1500)]
    trace = make_trace({"resid": (3, len(tokens))}, tokens=tokens)
    assert pixels(trace.plot(tmp_path / "a.png")).shape[0] <= 6000


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(reltrace.MissingDependency, match=r"pip install 'reltrace\[plot\]'"):
        make_trace().plot(tmp_path / "a.png")


def test_a_site_or_reduction_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="'head' was not requested"):
        make_trace().plot(tmp_path / "a.png", site="head")
    # The second has as many features as there are tokens.
    for shape in ((3, 7), (3, 5)):
        trace = make_trace({"resid": shape}, reduction="feature")
        for name in ("a.png", "a.html"):
            with pytest.raises(reltrace.InvalidArgument, match="no value per token"):
                trace.plot(tmp_path / name)
    assert "Strongest entries of site resid" in trace._repr_html_()


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_the_page_holds_the_numbers(tmp_path: Path) -> None:
    trace = make_trace({"resid": (3, 5), "embed": (5,)}, layers=(4, 2, 9))
    data = page_data(trace.plot(tmp_path / "a.html"))
    resid, embed = data["sites"]
    np.testing.assert_array_equal(floats(resid["values"]).reshape(5, 3).T, trace.relevance)
    np.testing.assert_array_equal(floats(embed["values"]), trace["embed"])
    assert (resid["columns"], resid["textColumn"]) == (["4", "2", "9"], 1)
    assert (embed["columns"], embed["textColumn"], embed["layered"]) == (["embed"], 0, False)
    assert data["tokens"] == ["<s>", " My", " cats", "</script>", "$x_1$"]
    assert data["special"] == [True, False, False, True, False]
    assert (data["first"], data["normalized"]) == (0, True)
    data = page_data(trace.plot(tmp_path / "b.html", site="embed", normalize=False))
    assert (data["first"], data["normalized"]) == (1, False)


def entries_of(site: dict[str, Any]) -> dict[tuple[int, int, int], float]:
    words = np.frombuffer(base64.b64decode(site["entries"]), "<i4").reshape(-1, 4)
    values = words[:, 3].copy().view("<f4")
    return {
        (int(row), int(token), int(feature)): float(value)
        for (row, token, feature, _), value in zip(words, values, strict=True)
    }


def test_the_page_holds_the_strongest_features(tmp_path: Path) -> None:
    trace = make_trace({"neuron": (3, 5, 40), "embed": (5, 7)}, reduction="full")
    neuron, embed = page_data(trace.plot(tmp_path / "a.html"))["sites"]
    found = entries_of(neuron)
    for place, value in found.items():
        assert value == trace["neuron"][place]
    for layer in range(3):
        for token in range(5):
            order = np.argsort(-np.abs(trace["neuron"][layer, token]))[:10]
            assert all((layer, token, int(feature)) in found for feature in order)
    assert neuron["note"] == f"Of 600 values the page holds the {len(found)} strongest."
    assert (neuron["feature"], embed["feature"], embed["note"]) == ("neuron", "unit", "")
    assert len(entries_of(embed)) == 35


def test_a_page_of_a_huge_trace_stays_small(tmp_path: Path) -> None:
    tokens = ["x"] * 400
    trace = make_trace({"neuron": (40, 400, 64)}, reduction="full", tokens=tokens)
    path = trace.plot(tmp_path / "a.html")
    assert path.stat().st_size < 2_000_000
    found = entries_of(page_data(path)["sites"][0])
    values = trace["neuron"]
    for layer in (0, 39):
        strongest = np.unravel_index(np.abs(values[layer]).argmax(), values[layer].shape)
        assert (layer, *map(int, strongest)) in found


def test_a_page_of_a_topk_trace(tmp_path: Path) -> None:
    trace = make_trace({"neuron": (2, 3)}, reduction="topk")
    parts = {
        "values": np.array([[5, -4, 1], [-9, 2, 0]], np.float32),
        "token": np.array([[0, 1, 1], [4, 4, 2]], np.int32),
        "feature": np.array([[17, 3, 2], [99, 1, 0]], np.int32),
    }
    trace = replace(trace, arrays={"neuron": parts})
    (neuron,) = page_data(trace.plot(tmp_path / "a.html"))["sites"]
    sums = floats(neuron["values"]).reshape(5, 2).T
    np.testing.assert_array_equal(sums, [[5, -3, 0, 0, 0], [0, 0, 0, 0, -7]])
    assert entries_of(neuron)[(1, 4, 99)] == -9
    assert "sum of the 6 values" in neuron["what"]


def test_the_page_asks_for_nothing_and_runs_nothing_of_the_prompt(tmp_path: Path) -> None:
    tokens = ["</script>", "<script>alert(1)</script>", "%%DATA%%", "<!--", "&lt;"]
    text = make_trace(tokens=tokens).plot(tmp_path / "a.html").read_text()
    assert not re.search(r"https?:|//[a-z]|\b(src|href)=|@import|url\(", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == text.count("<script") == 2
    assert page_data(tmp_path / "a.html")["tokens"] == tokens
    assert "%%TITLE%%" not in text


def test_what_colours_the_text() -> None:
    trace = make_trace({"attn_out": (3, 5), "resid": (3, 5), "embed": (5,)})
    np.testing.assert_array_equal(colours.token_values(trace).values, trace["embed"])
    np.testing.assert_array_equal(colours.token_values(trace, "resid").values, trace["resid"][0])
    summed = colours.token_values(trace, "attn_out")
    np.testing.assert_array_equal(summed.values, trace["attn_out"].sum(axis=0))
    assert summed.title == "site attn_out, sum over layers"


def test_colours() -> None:
    assert colours.colour(0) == colours.ZERO
    assert colours.colour(1) == colours.colour(7) == colours.POSITIVE
    assert colours.colour(-1) == colours.NEGATIVE
    assert colours.ink(colours.ZERO) == (0, 0, 0)
    assert colours.ink(colours.POSITIVE) == colours.ink(colours.NEGATIVE) == (255, 255, 255)
    np.testing.assert_array_equal(colours.scaled(np.zeros(3, np.float32)), 0)


def shown(trace: reltrace.Trace, **options: Any) -> str:
    file = io.StringIO()
    terminal.show(trace, Console(file=file, width=100, **options))
    return file.getvalue()


def test_the_terminal_colours_tokens() -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][:] = [-4, 0, 2, 4, 1]
    text = shown(trace, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;255;255;255;48;2;33;102;172m<s>" in text
    assert "\x1b[38;2;0;0;0;48;2;255;255;255m My" in text
    assert "\x1b[38;2;255;255;255;48;2;178;24;43m</script>" in text
    assert "-4 " in text
    assert "red: for the target, blue: against" in text


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "no_color": True}])
def test_without_colours_there_are_numbers(options: dict[str, Any]) -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][:] = [-4, 0, 2, 4, 1]
    text = shown(trace, **options)
    assert "48;2" not in text
    assert re.search(r"2 +' cats' +\+2", text)


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


def test_as_many_tokens_as_can_be_seen_have_their_rows() -> None:
    trace = make_trace({"embed": (600,)}, tokens=[f"Ġw{at}" for at in range(600)])
    trace["embed"][7] = np.nan
    assert heatmap(trace, "embed", normalize=False).shown.shape == (600, 1)
    larger = make_trace({"embed": (601,)}, tokens=[f"Ġw{at}" for at in range(601)])
    larger["embed"][7] = np.nan
    table = heatmap(larger, "embed", normalize=False)
    assert table.shown.shape == (101, 1)
    assert np.isnan(table.shown[1, 0])
