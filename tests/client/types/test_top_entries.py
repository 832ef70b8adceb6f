"""Single values of a trace."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import reltrace
from hypothesis import given
from hypothesis import strategies as st
from make_trace import make_trace

SHAPES = {
    "token": {"resid": (3, 5), "embed": (5,)},
    "feature": {"resid": (3, 4), "embed": (4,)},
    "full": {"resid": (3, 5, 4), "embed": (5, 4)},
}


def value_at(trace: reltrace.Trace, entry: reltrace.Entry) -> float:
    numbers = list(trace.layers or range(3))
    layer = None if entry.layer is None else numbers.index(entry.layer)
    index = [i for i in (layer, entry.position, entry.feature) if i is not None]
    return float(trace[entry.site][tuple(index)])


@pytest.mark.parametrize("reduction", SHAPES)
@pytest.mark.parametrize("site", ["resid", "embed"])
def test_the_largest_with_where_they_stand(reduction: str, site: str) -> None:
    trace = make_trace(SHAPES[reduction], reduction=reduction, layers=(7, 2, 5))
    entries = trace.top(4, site)
    largest = np.sort(np.abs(trace[site]).ravel())[::-1][:4]
    assert [abs(entry.value) for entry in entries] == pytest.approx(largest)
    for entry in entries:
        assert value_at(trace, entry) == entry.value
        assert (entry.layer is None) == (site == "embed")
        assert (entry.position is None) == (reduction == "feature")
        assert (entry.feature is None) == (reduction == "token")
        assert entry.token == (None if entry.position is None else trace.tokens[entry.position])


def topk_trace() -> reltrace.Trace:
    trace = make_trace({"neuron": (2, 3)}, reduction="topk")
    parts = {
        "values": np.array([[5, -4, 1], [-9, 2, 0]], np.float32),
        "token": np.array([[0, 1, 1], [4, 4, 2]], np.int32),
        "feature": np.array([[17, 3, 2], [99, 1, 0]], np.int32),
    }
    return replace(trace, arrays={"neuron": parts})


def test_of_a_topk_trace() -> None:
    first, second = topk_trace().top(2)
    assert first == reltrace.Entry(-9.0, "neuron", 1, 4, "$x_1$", 99)
    assert second == reltrace.Entry(5.0, "neuron", 0, 0, "<s>", 17)


def test_more_than_there_are() -> None:
    assert len(make_trace().top(1000)) == 15


def test_what_is_not_finite_comes_last() -> None:
    trace = make_trace({"embed": (5,)})
    trace["embed"][:] = [np.nan, 1, np.inf, -3, 0]
    assert [entry.position for entry in trace.top(3)] == [3, 1, 4]


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=30))
def test_equal_ones_come_in_order(values: list[float]) -> None:
    trace = make_trace({"embed": (len(values),)}, tokens=["x"] * len(values))
    trace["embed"][:] = values
    wanted = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert [entry.position for entry in trace.top(len(values))] == wanted


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_a_number_that_is_none(k: object) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="k: must be a whole number from 1 on"):
        make_trace().top(k)  # type: ignore[arg-type]


def test_a_site_that_was_not_asked_for() -> None:
    with pytest.raises(reltrace.InvalidArgument, match="'head' was not requested"):
        make_trace().top(3, "head")
    with pytest.raises(reltrace.InvalidArgument, match="'head' was not requested"):
        make_trace().to_pandas("head")


@pytest.mark.parametrize("reduction", SHAPES)
@pytest.mark.parametrize("site", ["resid", "embed"])
def test_a_data_frame(reduction: str, site: str) -> None:
    trace = make_trace(SHAPES[reduction], reduction=reduction, layers=(7, 2, 5))
    frame = trace.to_pandas(site)
    columns = {"token": ["position", "token"], "feature": ["feature"]}
    columns["full"] = [*columns["token"], *columns["feature"]]
    layer = [] if site == "embed" else ["layer"]
    assert list(frame.columns) == [*layer, *columns[reduction], "relevance"]
    np.testing.assert_array_equal(frame["relevance"], trace[site].ravel())
    if "token" in frame:
        assert frame["token"].tolist() == [trace.tokens[p] for p in frame["position"]]
    if layer:
        assert frame["layer"].unique().tolist() == [7, 2, 5]


def test_a_data_frame_of_a_topk_trace() -> None:
    frame = topk_trace().to_pandas()
    assert len(frame) == 6
    assert frame.iloc[3].to_list() == [1, 4, "$x_1$", 99, -9.0]


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(reltrace.MissingDependency, match=r"pip install 'reltrace\[pandas\]'"):
        make_trace().to_pandas()
