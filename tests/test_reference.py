"""The reference pages name the public API."""

import re
from pathlib import Path

import reltrace

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_on_one_page() -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")]
    named = [name for page in pages for name in re.findall(r"^::: reltrace\.(\w+)$", page, re.M)]
    assert sorted(named) == sorted(reltrace.__all__)


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.name for page in (ROOT / "docs" / "reference").glob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r"reference/([\w-]+\.md)$", navigation, re.M)) == pages
