"""The page of a trace, as people use it: in a browser, with a mouse and with keys."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reltrace
from fake_labels import FakeLabels
from make_trace import make_trace
from PIL import Image
from playwright.sync_api import Page

HEAD, ROW, COLUMN = 22, 20, 26

TOKENS = ["<s>", "ĠMy", "Ġcats", "</script>", "Ġ\u05e9\u05dc\u05d5\u05dd"]
SHAPES = {"resid": (3, 5, 8), "neuron": (3, 5, 40), "head": (3, 5, 4), "embed": (5, 8)}


Open = Callable[..., Page]


@pytest.fixture
def show(visit: Callable[[Path], Page], tmp_path: Path) -> Open:
    """Open the page of a trace."""

    def show(trace: reltrace.Trace, **options: object) -> Page:
        return visit(trace.plot(tmp_path / "trace.html", **options))  # type: ignore[arg-type]

    return show


@pytest.fixture
def trace() -> reltrace.Trace:
    return make_trace(SHAPES, tokens=TOKENS, reduction="full")


def shown(value: float) -> str:
    """Write a number as the page does: four digits, and a real minus."""
    text = f"{abs(value):#.4g}"
    if "e" not in text:
        text = text.rstrip(".")
    return ("\u2212" if value < 0 else "") + text


def point(page: Page, token: int, layer: int, *, click: bool = False) -> None:
    gutter = page.evaluate("gutter")
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x = box["x"] + (gutter + layer * COLUMN + COLUMN / 2 if layer >= 0 else gutter / 2)
    y = box["y"] + (HEAD + token * ROW + ROW / 2 if token >= 0 else HEAD / 2)
    page.mouse.move(x, y)
    if click:
        page.mouse.click(x, y)


def readout(page: Page) -> str:
    return page.locator("#readout").inner_text()


def colour_at(page: Page, token: int, layer: int) -> tuple[int, ...]:
    """Return the colour near the corner of a cell, where no mark is, once it is drawn."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    place = f"[gutter + {layer * COLUMN + 4}, {HEAD + token * ROW + 4}]"
    return tuple(
        page.evaluate(
            f"(([x, y]) => Array.from(ctx.getImageData(x * (devicePixelRatio || 1), "
            f"y * (devicePixelRatio || 1), 1, 1).data).slice(0, 3))({place})"
        )
    )


def expected_colour(share: float) -> tuple[int, ...]:
    end = (178, 24, 43) if share > 0 else (33, 102, 172)
    return tuple(round(255 + (one - 255) * min(1.0, abs(share))) for one in end)


def close_to(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 1 for a, b in zip(first, second, strict=True))


def rows(page: Page, site: str) -> list[list[str]]:
    table = page.locator(f"#detail table[data-site={site}] tbody tr")
    return [row.split("\t") for row in table.all_inner_texts()]


def test_pointing_at_a_cell_tells_its_value(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    assert "Point at a cell" in readout(page)
    values = trace.by_token("resid")
    for token, layer in ((0, 0), (2, 1), (4, 2)):
        point(page, token, layer)
        assert f"layer {layer}: R = {shown(values[layer, token])}," in readout(page)
    assert page.title() == "Relevance of ' dogs' (logit 17.250)"


def test_colours_are_those_of_the_values(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    values = trace.by_token("resid")
    per_layer = values / np.abs(values).max(axis=1, keepdims=True)
    raw = values / np.abs(values).max()
    for shares, name in ((per_layer, "layer"), (raw, "raw")):
        page.check(f"input[value={name}]")
        for token in range(5):
            for layer in range(3):
                found = colour_at(page, token, layer)
                assert close_to(found, expected_colour(shares[layer, token]))
    assert page.locator("#high").inner_text() == shown(np.abs(values).max())
    assert "raw relevance" in page.locator("#subtitle").inner_text()


def test_masking_the_first_token_takes_it_out_of_the_scale(
    show: Open, trace: reltrace.Trace
) -> None:
    trace["resid"][:, 0] *= 1000
    page = show(trace)
    page.check("#mask")
    values = trace.by_token("resid")
    shares = values / np.abs(values[:, 1:]).max(axis=1, keepdims=True)
    assert colour_at(page, 0, 1) == (235, 235, 235)
    for token in range(1, 5):
        assert close_to(colour_at(page, token, 1), expected_colour(shares[1, token]))
    assert page.locator("#words span").first.get_attribute("class") == "special masked"
    page.uncheck("#mask")
    assert close_to(colour_at(page, 0, 1), expected_colour(values[1, 0] / abs(values[1]).max()))


def test_a_click_on_a_cell_shows_its_strongest_neurons_and_heads(
    show: Open, trace: reltrace.Trace
) -> None:
    page = show(trace)
    point(page, 2, 1, click=True)
    for site, count in (("neuron", 10), ("head", 4)):
        values = trace[site][1, 2]
        order = np.argsort(-np.abs(values))[:count]
        found = rows(page, site)
        assert [int(row[0]) for row in found][: len(order)] == order.tolist()
        assert found[0] == [str(order[0]), "1", "2", " cats", shown(values[order[0]])]
    headings = page.locator("#detail h2").all_inner_texts()
    assert (
        headings[0]
        == "Strongest neurons (site neuron): token 2 \u201c\u2068cats\u2069\u201d, layer 1"
    )


def test_a_click_on_a_layer_or_a_token(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    point(page, -1, 2, click=True)
    feature = np.abs(trace["neuron"][2]).max(axis=0).argmax()
    assert rows(page, "neuron")[0][:2] == [str(feature), "2"]
    assert "layer 2" in page.locator("#text-title").inner_text()
    point(page, 1, -1, click=True)
    layer, feature = np.unravel_index(np.abs(trace["neuron"][:, 1]).argmax(), (3, 40))
    assert rows(page, "neuron")[0][:4] == [str(feature), str(layer), "1", " My"]
    page.locator("#words span").nth(4).click()
    layer, feature = np.unravel_index(np.abs(trace["neuron"][:, 4]).argmax(), (3, 40))
    assert rows(page, "neuron")[0][:2] == [str(feature), str(layer)]


def test_labels_are_beside_their_neurons_and_heads(show: Open, trace: reltrace.Trace) -> None:
    """
    Given an atlas of which one label looks like markup, and one neuron has none
    I expect every strong neuron and head beside its own label, as text.
    """
    order = np.argsort(-np.abs(trace["neuron"][1, 2]))
    texts = {("neuron", 1, int(n)): f"label of {n}" for n in order[2:]}
    texts["neuron", 1, int(order[0])] = "</script><b>"
    texts |= {("head", 1, n): f"head {n}" for n in range(4)}
    page = show(trace, atlas=FakeLabels(texts))
    point(page, 2, 1, click=True)
    heads = page.locator("#detail table[data-site=neuron] th").all_inner_texts()
    assert heads == ["neuron", "layer", "position", "token", "R", "label"]
    found = rows(page, "neuron")[:10]
    assert [int(row[0]) for row in found] == order[:10].tolist()
    assert [row[5] for row in found] == [
        "</script><b>",
        "",
        *(f"label of {n}" for n in order[2:10]),
    ]
    assert [row[5] for row in rows(page, "head")] == [
        f"head {n}" for n in np.argsort(-np.abs(trace["head"][1, 2]))
    ]
    assert page.locator("#detail b").count() == 0
    resid = page.locator("#detail table[data-site=resid] th").all_inner_texts()
    assert resid == ["unit", "layer", "position", "token", "R"]
    point(page, 0, 0, click=True)
    assert {row[5] for row in rows(page, "neuron")} == {""}


def test_without_an_atlas_there_is_no_column_for_labels(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    heads = page.locator("#detail table[data-site=neuron] th").all_inner_texts()
    assert heads == ["neuron", "layer", "position", "token", "R"]


def test_keys_move_and_choose(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    page.focus("#map")
    for key, place in (
        ("ArrowDown", "token 0"), ("ArrowDown", "token 1"), ("End", "layer 2"),
        ("ArrowLeft", "layer 1"), ("PageDown", "token 4"), ("Home", "layer 0"),
        ("ArrowUp", "token 3"), ("Control+Home", "token 0"), ("Control+End", "token 4"),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert place in readout(page), key
    page.keyboard.press("Enter")
    assert len(rows(page, "head")) == 4
    page.keyboard.press("Escape")
    assert "the whole trace" in page.locator("#detail h2").first.inner_text()


def test_everything_is_reached_by_tab(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert reached == ["site", "scale", "mask", "map"]


def test_another_site(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    page.select_option("#site", label="embed")
    values = trace.by_token("embed")
    assert close_to(colour_at(page, 3, 0), expected_colour(values[3] / np.abs(values).max()))
    point(page, 3, 0)
    assert f"site embed: R = {shown(values[3])}" in readout(page)
    page.select_option("#site", label="head")
    point(page, 3, 2)
    assert f"R = {shown(trace.by_token('head')[2, 3])}" in readout(page)


def test_a_trace_without_features_says_how_to_get_them(show: Open) -> None:
    page = show(make_trace({"resid": (3, 5)}))
    assert 'sites=["neuron", "head"]' in page.locator("#detail").inner_text()
    assert page.locator("#site-choice").is_hidden()


def test_values_that_are_not_finite(show: Open) -> None:
    trace = make_trace({"resid": (3, 5)})
    trace.relevance[1, 1] = np.nan
    page = show(trace)
    point(page, 1, 1)
    assert "R = not finite" in readout(page)
    assert colour_at(page, 1, 1) == (128, 128, 128)


def test_thousands_of_tokens(show: Open) -> None:
    """
    Given 4,000 tokens in 32 layers
    I expect a canvas no larger than the window, and the last token within reach.
    """
    tokens = ["<s>", *(f"Ġword{number}" for number in range(3999))]
    trace = make_trace({"resid": (32, 4000)}, tokens=tokens)
    page = show(trace)
    assert page.evaluate("canvas.height / (devicePixelRatio || 1)") <= 850
    page.focus("#map")
    page.keyboard.press("Control+End")
    page.keyboard.press("End")
    value = trace.relevance[31, 3999]
    assert f"\u201c\u2068word3998\u2069\u201d, layer 31: R = {shown(value)}" in readout(page)
    top = page.evaluate("map.scrollTop")
    assert top > 3900 * ROW
    share = value / np.abs(trace.relevance[31]).max()
    token = 3999 - top / ROW
    page.evaluate("state.at = null")
    page.evaluate("paint()")
    assert close_to(colour_at(page, token, 31), expected_colour(share))


@pytest.mark.parametrize("label", [None, "a long label " * 20, "x" * 300])
def test_a_narrow_window(show: Open, trace: reltrace.Trace, label: str | None) -> None:
    places = np.ndindex(3, 40)
    labels = label and FakeLabels({("neuron", *place): label for place in places})
    page = show(trace, atlas=labels)
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert re.fullmatch(r"\d+px", page.evaluate("canvas.style.width"))
    point(page, 1, 1)
    assert "token 1" in readout(page)


@pytest.mark.parametrize("width", [400, 1300])
def test_a_screenshot_shows_the_heatmap(show: Open, trace: reltrace.Trace, width: int) -> None:
    """What is seen, not what is drawn: each cell in its colour, and nothing beyond the window."""
    page = show(trace)
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")
    gutter = page.evaluate("gutter")
    values = trace.by_token("resid")
    shares = values / np.abs(values).max(axis=1, keepdims=True)
    for token in range(5):
        for layer in range(3):
            place = (gutter + layer * COLUMN + 4, HEAD + token * ROW + 4)
            seen = picture.getpixel(place)
            assert isinstance(seen, tuple)
            assert close_to(seen, expected_colour(shares[layer, token]))
    assert picture.width <= width


def test_a_conversation_shows_its_turns(show: Open, trace: reltrace.Trace) -> None:
    candidates = (reltrace.Candidate("Ġdogs", 42, 17.25, 0.5),)
    chat = replace(
        trace,
        turns=(reltrace.Turn("user", 1, 3), reltrace.Turn("assistant", 4, 5)),
        hints=("ends in <b>",),
        target=replace(trace.target, candidates=candidates),
    )
    page = show(chat)
    assert page.locator("#words .turn .role").all_inner_texts() == ["user", "assistant"]
    assert page.locator("#words .turn").first.inner_text() == "user My cats"
    assert page.locator("#hints li").all_inner_texts() == ["ends in <b>"]
    assert page.locator("#next").inner_text() == "Likeliest next: ' dogs' 50.0%."
    point(page, 2, 1)
    assert readout(page).startswith("token 2 “\u2068cats\u2069” (user), layer 1: R = ")
    point(page, 3, 1)
    assert "(user)" not in readout(page)


def test_the_share_of_the_first_token_is_shown(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    for site in ("resid", "embed"):
        page.select_option("#site", label=site)
        share = round(100 * trace.first_token_share(site).total)
        assert f"The first token has {share} % of |R|." in page.locator("#subtitle").inner_text()


def test_a_plain_text_is_one_block(show: Open, trace: reltrace.Trace) -> None:
    page = show(trace)
    assert page.locator("#words > div").count() == 1
    assert not page.locator("#hints").is_visible()
    assert not page.locator("#next").is_visible()
