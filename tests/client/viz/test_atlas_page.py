"""The page of an atlas, as people use it: in a browser, with a mouse and with keys."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import reltrace
from make_atlas import make_atlas
from playwright.sync_api import Page, expect

PROMPTS = [
    ("my cats run", "far"), ("the big cats", "sleep"), ("old men go", "home"),
    ("an old dog went", "home"), *[("we eat the </script><b>pie", "now")] * 300,
]  # fmt: skip
PLACES = {
    (1, 0): [(0, 1, 0.5), (1, 2, 0.75)],
    (1, 1): [(2, 2, 0.4), (3, 3, 0.3), (0, 0, -0.2)],
    (0, 2): [(10, 3, 5.0), (11, 3, 4.0)],
}


@pytest.fixture
def atlas(tmp_path: Path) -> reltrace.Atlas:
    return make_atlas(tmp_path / "atlas", PROMPTS, PLACES)


@pytest.fixture
def page(visit: Callable[[Path], Page], atlas: reltrace.Atlas, tmp_path: Path) -> Page:
    return visit(atlas.save_page(tmp_path / "atlas.html"))


def rows(page: Page) -> list[str]:
    return [" ".join(row.split()) for row in page.locator("#rows tr").all_inner_texts()]


def detail(page: Page) -> str:
    return " ".join(page.locator("#detail").inner_text().split())


def test_neurons_are_listed_by_mass(page: Page) -> None:
    assert rows(page)[:3] == ["0 2 9 –", "1 0 1.25 cats", "1 1 0.9 → home · … old"]
    assert page.locator("#counted").inner_text() == "6 of 6 neurons"
    assert page.title() == "Atlas of tiny"
    assert "304 prompts" in page.locator("#subtitle").inner_text()


def test_the_first_is_chosen_and_its_text_is_not_markup(page: Page) -> None:
    assert "Neuron 2 of layer 0" in detail(page)
    assert "No token stands out" in detail(page)
    assert "we eat the </script><b>pie → now" in detail(page)
    strong = page.locator(".strong").first
    assert strong.inner_text() == "</script><b>pie"
    assert strong.evaluate("one => getComputedStyle(one).backgroundColor") == "rgb(178, 24, 43)"


def test_a_click_shows_contexts_with_the_token_that_is_strong(page: Page) -> None:
    page.get_by_text("→ home").first.click()
    assert "Neuron 1 of layer 1" in detail(page)
    assert "→ home in 2 of 2" in detail(page)
    assert page.locator(".contexts .strong").all_inner_texts() == ["go", "went"]
    page.get_by_role("button", name="against it (1)").click()
    strong = page.locator(".contexts .strong")
    assert strong.all_inner_texts() == ["my"]
    assert strong.evaluate("one => getComputedStyle(one).backgroundColor") == "rgb(33, 102, 172)"
    assert page.url.endswith("#neuron-1-1")


def test_search_finds_labels_contexts_and_places(page: Page) -> None:
    page.fill("#search", "OLD")
    assert rows(page) == ["1 1 0.9 2 of 2 → home · … old"]
    # What was typed stays in the box when the list is clicked, and the click is not lost.
    page.locator("#rows tr").click()
    assert page.locator(".contexts mark").all_inner_texts() == ["old", "old"]
    page.fill("#search", "big cats")
    assert rows(page) == ["1 0 1.25 1 of 2 cats"]
    page.fill("#search", "1/2")
    assert rows(page) == ["1 2 0 0 of 0 –"]
    page.fill("#search", "")
    assert len(rows(page)) == 6


def test_details_are_hidden_when_the_list_no_longer_has_them(page: Page) -> None:
    """
    Given a neuron that is shown
    If what is listed then has others, or nothing
    I expect it to be gone, and a sentence in its place.
    """
    assert "Neuron 2 of layer 0" in detail(page)
    expect(page.locator("#nothing")).to_be_hidden()
    page.get_by_role("radio", name="heads").check()
    assert detail(page) == "Choose a head in the list."
    assert "#" not in page.url
    page.locator("#rows tr").first.click()
    assert "Head 0 of layer 0" in detail(page)
    page.fill("#search", "nowhere")
    expect(page.locator("#nothing")).to_have_text("Nothing matches.")
    assert (rows(page), detail(page)) == ([], "")
    page.fill("#search", "")
    expect(page.locator("#nothing")).to_be_hidden()


@pytest.mark.parametrize(("height", "scrolls"), [(900, False), (420, True)])
def test_in_a_narrow_window_a_click_shows_something(page: Page, height: int, scrolls: bool) -> None:
    page.set_viewport_size({"width": 500, "height": height})
    page.evaluate("scrollTo(0, 0)")
    page.locator("#rows tr").nth(1).click()
    heading = page.locator("#detail h2")
    expect(heading).to_have_text("Neuron 0 of layer 1")
    expect(heading).to_be_in_viewport()
    assert (page.evaluate("scrollY") > 0) == scrolls
    # It does not scroll sideways.
    assert page.evaluate("document.documentElement.scrollWidth") <= 500


@pytest.mark.parametrize("contexts", [1, 8])
def test_a_search_finds_what_the_command_finds(
    visit: Callable[[Path], Page], tmp_path: Path, contexts: int
) -> None:
    """
    Given texts in contexts of both signs, in several, and in labels somebody gave
    I expect a page to list the same neurons as `Atlas.find`, in the same order, with the same
    counts, however few contexts it shows.
    """
    long = " ".join(f"w{number}" for number in range(40))
    prompts = [
        ("my old cats eat the pie", "home"), ("an old dog eats", "PIE"), ("old STRASSE", "cats"),
        (long, "end"), ("old cats at home", "old"),
    ]  # fmt: skip
    places = {
        (0, 0): [(0, 2, 0.5), (1, 2, 0.25), (4, 3, -3.0)],
        (0, 1): [(0, 5, 1.0), (4, 1, 0.125), (2, 0, -1.0), (2, 1, -2.0)],
        (0, 2): [(1, 1, 0.75), (2, 1, 0.5)],
        # The text begins 24 tokens before the first of these, 25 before the other.
        (1, 0): [(3, 26, 1.0)], (1, 1): [(3, 27, 1.0)], (1, 2): [(0, 0, 0.5), (4, 0, 0.5)],
    }  # fmt: skip
    atlas = make_atlas(tmp_path / "atlas", prompts, places)
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"layer": 1, "index": 1, "label": "Cats"}\n')
    atlas.import_labels(labels)
    page = visit(atlas.save_page(tmp_path / "page.html", contexts=contexts))
    for text in ("old", "cats", "PIE", "home", "eat the", "straße", "w2 w3"):
        found = [f"{m.layer} {m.index} {m.count} of {m.of}" for m in atlas.find(text)]
        assert found, text
        page.fill("#search", text)
        cells = [row.locator("td").all_inner_texts() for row in page.locator("#rows tr").all()]
        assert [f"{layer} {index} {count}" for layer, index, _, count, _ in cells] == found, text


def test_a_search_finds_white_space_as_the_command_does(
    visit: Callable[[Path], Page], tmp_path: Path
) -> None:
    prompts = [("the end. LINE next", "x"), ("a WIDE next", "x"), ("a b c", "FIXED")]
    places = {(0, neuron): [(neuron, 1, 1.0)] for neuron in range(3)}
    texts = {"LINE": "\n", "WIDE": "\u3000", "FIXED": " no\u00a0break\u202e"}
    atlas = make_atlas(tmp_path / "atlas", prompts, places, texts_of=texts)
    page = visit(atlas.save_page(tmp_path / "page.html"))
    for text in ("end.↵ next", "a\u3000 next", "a  NEXT", "no break", "no\u00a0BREAK\u202e"):
        found = [str(match.index) for match in atlas.find(text)]
        assert len(found) == 1, text
        page.fill("#search", text)
        assert [row.split()[1] for row in rows(page)] == found, text
        page.locator("#rows tr").click()
        assert page.locator(".contexts mark").count() > 0, text


def test_right_to_left_text_stays_in_order(visit: Callable[[Path], Page], tmp_path: Path) -> None:
    """
    Given prompts, explained words and labels in Hebrew
    I expect the arrow right of the prompt, what is explained right of it, and the words of a label
    from the left to the right; within a prompt, the first word on the right.
    """
    prompts = [("אבא קורא ספר גדול", "שלום"), ("אבא קורא עיתון גדול", "שלום")]
    atlas = make_atlas(
        tmp_path / "atlas",
        [*prompts, *[("a b c", "d")] * 300],
        {(0, 0): [(0, 1, 1.0), (1, 1, 0.5)]},
    )
    words = atlas.label(0, 0).split(" · ")
    assert sorted(words) == sorted(["קורא", "→ שלום", "… אבא"])
    page = visit(atlas.save_page(tmp_path / "page.html"))

    def left_of(where: str) -> list[float]:
        found = page.locator(where)
        return [found.nth(number).bounding_box()["x"] for number in range(found.count())]

    page.locator("#rows tr").first.click()
    first_line = ".contexts tr:nth-child(2) td.text"
    shown = left_of(f"{first_line} > bdi > *")
    assert len(shown) == 4
    assert shown == sorted(shown, reverse=True)
    [target] = left_of(f"{first_line} .target bdi")
    [prompt] = left_of(f"{first_line} small")
    assert max(shown) < target < prompt
    for label in ("#rows tr:first-child td.label", "#detail p.label"):
        names = left_of(f"{label} bdi")
        assert len(names) == 3
        assert names == sorted(names)


def test_the_only_relevant_neuron_has_100_percent(
    visit: Callable[[Path], Page], tmp_path: Path
) -> None:
    atlas = make_atlas(tmp_path / "atlas", [("a b", "c")], {(0, 0): [(0, 1, 1.0)]})
    page = visit(atlas.save_page(tmp_path / "page.html"))
    assert "100 % of all neurons" in detail(page)


def test_lists_are_sorted_and_cut_to_a_layer(page: Page) -> None:
    page.select_option("#sort", "layer")
    assert [row[:3] for row in rows(page)] == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    page.select_option("#sort", "label")
    # Of "→ home" the h counts; those without a label come last.
    assert [row[:3] for row in rows(page)][:2] == ["1 0", "1 1"]
    page.select_option("#layer", "1")
    assert page.locator("#counted").inner_text() == "3 of 6 neurons"
    page.get_by_role("radio", name="heads").check()
    assert page.locator("#counted").inner_text() == "6 of 6 heads"


def test_keys_move_through_the_list(page: Page) -> None:
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#detail h2")).to_have_text("Neuron 0 of layer 1")
    page.keyboard.press("End")
    expect(page.locator('#rows tr[aria-selected="true"]')).to_have_count(1)
    page.keyboard.press("Home")
    expect(page.locator("#detail h2")).to_have_text("Neuron 2 of layer 0")


def test_a_page_holds_those_with_most_mass(
    visit: Callable[[Path], Page], atlas: reltrace.Atlas, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        json.dumps({"layer": 0, "index": 2, "label": "<img src=x>", "by": "Ida"}) + "\n"
    )
    atlas.import_labels(labels)
    page = visit(atlas.save_page(tmp_path / "few.html", most=2, contexts=1))
    assert page.locator("#counted").inner_text() == (
        "2 of 6 neurons; the page has the 2 with most relevance"
    )
    assert rows(page)[0] == "0 2 9 <img src=x>"
    assert "<img src=x> (by Ida)" in detail(page)
    assert page.locator(".contexts .text").count() == 1
    page.locator("#rows tr").nth(1).click()
    assert page.locator(".tabs button").first.inner_text() == "for the prediction (1 of 2)"


def test_bad_arguments_say_what_is_allowed(atlas: reltrace.Atlas, tmp_path: Path) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"path: must end in \.html"):
        atlas.save_page(tmp_path / "x.pdf")
    with pytest.raises(reltrace.InvalidArgument, match="most: must be a whole number from 1 on"):
        atlas.save_page(tmp_path / "x.html", most=0)
