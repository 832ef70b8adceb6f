"""What the page of a trace holds."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from make_trace import make_trace


def page_data(path: Path) -> Any:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    assert match
    return json.loads(match.group(1))


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


def test_the_page_loads_nothing_and_runs_no_text_of_the_prompt(tmp_path: Path) -> None:
    tokens = ["</script>", "<script>alert(1)</script>", "%%DATA%%", "<!--", "&lt;"]
    text = make_trace(tokens=tokens).plot(tmp_path / "a.html").read_text()
    assert not re.search(r"https?:|//[a-z]|\b(src|href)=|@import|url\(", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == text.count("<script") == 2
    assert page_data(tmp_path / "a.html")["tokens"] == tokens
    assert "%%TITLE%%" not in text
