"""What a notebook shows."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import reltrace
from make_atlas import make_atlas
from make_trace import make_trace
from reltrace.viz.colours import token_values


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


def test_text_is_not_markup() -> None:
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


def test_a_trace_without_tensors_shows_its_target() -> None:
    trace = replace(make_trace(), arrays={})
    text = "".join(Checked(trace._repr_html_()).words)
    assert "Relevance of ' dogs' (logit 17.250)" in text
    assert "there are no tensors" in text
    with pytest.raises(reltrace.InvalidArgument, match="site: is not there: no site was requested"):
        token_values(trace)


def test_nan_is_grey() -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][1] = np.nan
    assert "background:#808080" in trace._repr_html_()


def test_a_neuron_with_its_contexts(tmp_path: Path) -> None:
    """
    Given a neuron of an atlas that speaks for a prediction and against another
    I expect its label and its contexts, the token where it is strong apart from the others, and
    what a prompt says to be no markup.
    """
    prompts = [("my <b>cats</b> run", "far"), ("the big cats", "</div>")]
    places = {(1, 0): [(0, 1, 0.5), (1, 2, -0.25)]}
    neuron = make_atlas(tmp_path, prompts, places).neuron(1, 0)
    found = Checked(neuron._repr_html_())
    assert "no token stands out in its contexts" in found.words
    assert {"+0.5", " my ", "<b>cats</b>", " run", "far"} <= set(found.words)
    assert {"-0.25", " the big ", "cats", "</div>"} <= set(found.words)
    assert repr(neuron) == "Feature(neuron 0 of layer 1, no label)"
    assert str(neuron.contexts["relevance-"][0]) == " the big ⟦cats⟧"


def test_a_neuron_that_is_never_relevant_is_shown_too(tmp_path: Path) -> None:
    neuron = make_atlas(tmp_path, [("a b", "c")], {}).neuron(0, 0)
    assert "R" in Checked(neuron._repr_html_()).words
