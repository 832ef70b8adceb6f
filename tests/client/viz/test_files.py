"""The file of a plot: its ending, its folder and what it needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import reltrace
from make_trace import make_trace


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
