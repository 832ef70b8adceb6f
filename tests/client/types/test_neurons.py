"""The strongest neurons and heads of a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reltrace
from fake_labels import FakeLabels
from make_trace import TOKENS, make_trace
from reltrace import StrongHead, StrongNeuron

LAYERS = (7, 2, 5)


def topk_trace() -> reltrace.Trace:
    parts = {
        "values": np.array([[5, -4, 1], [-9, 2, 0]], np.float32),
        "token": np.array([[0, 1, 1], [4, 4, 2]], np.int32),
        "feature": np.array([[17, 3, 2], [99, 1, 0]], np.int32),
    }
    trace = make_trace({"neuron": (2, 3)}, reduction="topk", layers=(6, 3))
    return replace(trace, arrays={"neuron": parts})


def test_of_a_full_trace() -> None:
    trace = make_trace({"resid": (3, 5, 4), "neuron": (3, 5, 8)}, reduction="full", layers=LAYERS)
    values = trace["neuron"]
    order = np.argsort(-np.abs(values).ravel(), kind="stable")[:6]
    expected = [
        StrongNeuron(LAYERS[layer], neuron, at, TOKENS[at], float(values[layer, at, neuron]), "")
        for layer, at, neuron in zip(
            *(axis.tolist() for axis in np.unravel_index(order, values.shape)), strict=True
        )
    ]
    assert trace.neurons(6) == expected
    assert len(trace.neurons()) == 10
    assert len(trace.neurons(1000)) == values.size


def test_of_a_feature_trace() -> None:
    trace = make_trace({"neuron": (3, 8)}, reduction="feature", layers=LAYERS)
    values = trace["neuron"]
    layer, neuron = np.unravel_index(np.abs(values).argmax(), values.shape)
    (found,) = trace.neurons(1)
    expected = StrongNeuron(
        LAYERS[int(layer)], int(neuron), None, None, float(values[layer, neuron]), ""
    )
    assert found == expected


def test_of_a_topk_trace() -> None:
    assert topk_trace().neurons(3) == [
        StrongNeuron(3, 99, 4, "$x_1$", -9.0, ""),
        StrongNeuron(6, 17, 0, "<s>", 5.0, ""),
        StrongNeuron(6, 3, 1, "ĠMy", -4.0, ""),
    ]


def test_with_labels() -> None:
    labels = FakeLabels({("neuron", 3, 99): "</script>", ("head", 6, 17): "another site"})
    assert [found.label for found in topk_trace().neurons(2, labels)] == ["</script>", ""]
    assert labels.asked == [("neuron", 3, 99), ("neuron", 6, 17)]


def test_heads() -> None:
    trace = make_trace({"head": (3, 5, 2)}, reduction="full", layers=LAYERS)
    values = trace["head"]
    layer, at, head = map(int, np.unravel_index(np.abs(values).argmax(), values.shape))
    expected = StrongHead(
        LAYERS[layer], head, at, TOKENS[at], float(values[layer, at, head]),
        f"head {LAYERS[layer]}:{head}",
    )  # fmt: skip
    assert trace.heads(1, FakeLabels()) == [expected]


ASK = 'ask for .*reduce="topk", "feature" or "full"'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"shapes": {"resid": (3, 5)}},
            rf"sites: 'neuron' is not in the trace \(.* resid\); {ASK}",
        ),
        ({"shapes": {"neuron": (3, 5)}}, f"reduce: 'token' summed over the neurons; {ASK}"),
    ],
)
def test_a_trace_without_neurons(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=message):
        make_trace(**arguments).neurons()


def test_a_trace_of_no_site() -> None:
    trace = replace(make_trace(), arrays={})
    with pytest.raises(reltrace.InvalidArgument, match=r'no site was requested.*sites=\["head"\]'):
        trace.heads()


@pytest.mark.parametrize("k", [0, 1.5, True, None])
def test_a_number_that_is_none(k: Any) -> None:
    with pytest.raises(reltrace.InvalidArgument, match="k: must be a whole number from 1 on"):
        topk_trace().neurons(k)


@pytest.mark.parametrize(
    ("atlas", "message"),
    [
        (FakeLabels(made_by=("tiny", "r2")), "atlas: is of tiny@r2; the trace is of tiny@r1"),
        (FakeLabels(made_by=("other", "r1")), "atlas: is of other@r1; the trace is of tiny@r1"),
        (FakeLabels(made_by=()), "atlas: is of no model: it is empty; the trace is of tiny@r1"),
        ("atlas", "atlas: must be what reltrace.load_atlas returns, not str"),
    ],
)
def test_an_atlas_of_something_else(atlas: Any, message: str, tmp_path: Path) -> None:
    """Wrong labels are worse than none."""
    trace = topk_trace()
    for call in (
        lambda: trace.neurons(3, atlas),
        lambda: trace.plot(tmp_path / "a.html", atlas=atlas),
    ):
        with pytest.raises(reltrace.InvalidArgument, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
