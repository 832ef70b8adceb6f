"""Labels of an atlas on the page of a trace, and where there is no room for them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
from fake_labels import FakeLabels
from make_trace import make_trace
from reltrace.viz import terminal
from rich.console import Console


def sites_of(path: Path) -> dict[str, Any]:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    assert match
    return {site["name"]: site for site in json.loads(match.group(1))["sites"]}


def test_the_page_holds_the_labels_of_its_entries_once(tmp_path: Path) -> None:
    """
    Given a trace of two layers, in one of which ten neurons alone are relevant
    I expect labels of what is on the page and of nothing else, each once, and no empty ones.
    """
    shapes = {"resid": (2, 5, 6), "neuron": (2, 5, 40), "head": (2, 5, 4)}
    trace = make_trace(shapes, reduction="full", layers=(7, 3))
    trace["neuron"][0, :, 10:] = 0
    labels = FakeLabels()
    found = sites_of(trace.plot(tmp_path / "a.html", atlas=labels))
    assert found["neuron"]["labels"]["7"] == {str(i): f"neuron 7:{i}" for i in range(10)}
    entries = np.frombuffer(base64.b64decode(found["neuron"]["entries"]), "<i4").reshape(-1, 4)
    on_page = {("neuron", (7, 3)[row], feature) for row, _, feature, _ in entries.tolist()}
    assert on_page == {key for key in labels.asked if key[0] == "neuron"}
    strongest = np.argsort(-np.abs(trace["neuron"][1]), axis=1)[:, :10]
    assert set(strongest.ravel().tolist()) <= set(map(int, found["neuron"]["labels"]["3"]))
    assert found["head"]["labels"]["3"]["2"] == "head 3:2"
    assert found["resid"]["labels"] is None
    assert len(labels.asked) == len(set(labels.asked))
    some = FakeLabels({("neuron", 7, 4): "four", ("head", 3, 1): "one"})
    found = sites_of(trace.plot(tmp_path / "a.html", atlas=some))
    assert found["neuron"]["labels"] == {"7": {"4": "four"}}
    assert found["head"]["labels"] == {"3": {"1": "one"}}


def test_without_an_atlas_or_features_there_are_none(tmp_path: Path) -> None:
    full = make_trace({"neuron": (3, 5, 8)}, reduction="full")
    assert sites_of(full.plot(tmp_path / "a.html"))["neuron"]["labels"] is None
    sums = make_trace({"neuron": (3, 5)})
    assert sites_of(sums.plot(tmp_path / "a.html", atlas=FakeLabels()))["neuron"]["labels"] is None


def test_a_label_is_not_markup(tmp_path: Path) -> None:
    trace = make_trace({"head": (1, 5, 3)}, reduction="full")
    texts = ["</script><b>", "<!--<script>", "a\nb\x1b[31m\u202e\ud800 \u2028%%ABOUT%%"]
    labels = FakeLabels({("head", 0, index): text for index, text in enumerate(texts)})
    path = trace.plot(tmp_path / "a.html", atlas=labels)
    text = path.read_text()
    assert text.count("</script>") == text.count("<script") == 2
    assert "<b>" not in text
    assert sites_of(path)["head"]["labels"]["0"] == {
        "0": texts[0],
        "1": texts[1],
        "2": r"a↵b\x1b[31m\u202e\ud800 \u2028%%ABOUT%%",
    }


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "PNG"])
def test_a_picture_has_no_room_for_labels(tmp_path: Path, ending: str) -> None:
    trace = make_trace({"neuron": (3, 5, 8)}, reduction="full")
    with pytest.raises(reltrace.InvalidArgument, match=r"atlas: has labels for \.html, not for \."):
        trace.plot(tmp_path / f"a.{ending}", atlas=FakeLabels())
    assert list(tmp_path.iterdir()) == []


def test_a_label_in_the_terminal() -> None:
    trace = make_trace({"resid": (2, 4), "neuron": (2, 4)}, reduction="feature")
    layer, neuron = map(int, np.unravel_index(np.abs(trace["neuron"]).argmax(), (2, 4)))
    labels = FakeLabels({("neuron", layer, neuron): "[red]\x1b[31m\n"})
    file = io.StringIO()
    terminal.show(trace, Console(file=file, width=100), atlas=labels)
    head, first = file.getvalue().partition("site neuron\n")[2].splitlines()[:2]
    assert head.split() == ["layer", "feature", "relevance", "label"]
    assert first.split() == [
        str(layer), str(neuron), f"{trace['neuron'][layer, neuron]:+.4g}", r"[red]\x1b[31m↵",
    ]  # fmt: skip
    assert "label" not in file.getvalue().partition("site neuron\n")[0]
