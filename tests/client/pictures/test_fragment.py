"""What a notebook shows."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from make_trace import make_trace


class Checked(HTMLParser):
    """Collects text and titles; fails on what is not closed, or could run or load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "span", "b", "i", "table", "tr", "th", "td", "details", "summary")
        assert {name for name, _ in attrs} <= {"style", "title"}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_tokens_with_their_values() -> None:
    trace = make_trace({"embed": (5,), "resid": (3, 5)})
    found = Checked(trace._repr_html_())
    assert found.words[found.words.index(" My") :][:3] == [" My", " cats", "</script>"]
    for position, value in enumerate(trace["embed"]):
        assert f"{position}: {value:+.4g}" in found.titles
    for layer in range(3):
        assert f"layer {layer}: {trace['resid'][layer, 2]:+.4g}" in found.titles
    assert any("logit 17.250" in word for word in found.words)


def test_text_is_no_markup() -> None:
    tokens = ["<script>alert(1)</script>", "&amp;", '" onmouseover="x', "<!--"]
    found = Checked(make_trace({"resid": (2, 4)}, tokens=tokens)._repr_html_())
    assert "<script>alert(1)</script>" in "".join(found.words)


@pytest.mark.parametrize(("tokens", "layers"), [(4000, 80), (500, 2), (3, 200)])
def test_its_size_is_bounded(tokens: int, layers: int) -> None:
    trace = make_trace({"resid": (layers, tokens)}, tokens=[f"w{i}" for i in range(tokens)])
    text = trace._repr_html_()
    assert len(text) < 300_000
    if tokens > 600:
        assert f"… {tokens - 600} tokens …" in text
        assert "w0" in text
        assert f"w{tokens - 1}" in text


def test_without_values_per_token_the_strongest_are_shown() -> None:
    trace = make_trace({"resid": (3, 7)}, reduction="feature")
    found = Checked(trace._repr_html_())
    strongest = float(trace.relevance.flat[np.abs(trace.relevance).argmax()])
    assert f"{strongest:+.4g}" in found.words
    assert "Strongest entries of site resid" in "".join(found.words)


def test_nan_is_grey() -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][1] = np.nan
    assert "background:#808080" in trace._repr_html_()
