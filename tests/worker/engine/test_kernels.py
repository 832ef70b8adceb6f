"""Kernels per decoder layer: what a short pass on a GPU is bound by."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from bench.models import SHAPES, build, job
from reference.kernels import FLASH_BACKWARD, kernels_per_layer
from reltrace_worker.lrp.joined import join_linear_layers
from reltrace_worker.models.loading import LoadedModel

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts what torch dispatches on a CPU"
)


@pytest.fixture(scope="module")
def models() -> tuple[LoadedModel, LoadedModel]:
    """Two LLaMAs as on a GPU, in bfloat16, one of them a layer deeper."""
    shallow, deep = (
        build(replace(SHAPES["tiny"], layers=layers), torch.bfloat16) for layers in (1, 2)
    )
    for loaded in (shallow, deep):
        join_linear_layers(loaded.model)
    return shallow, deep


def per_layer(models: tuple[LoadedModel, LoadedModel], rule: str, compiled: bool) -> Counter[str]:
    return kernels_per_layer(*models, job(list(range(20)), rule), compiled)


@pytest.mark.parametrize(
    ("rule", "compiled", "most"),
    [
        ("attnlrp", True, 24),
        ("cp_lrp", True, 24),
        ("gradient", True, 93),
        ("attnlrp", False, 75),
        ("cp_lrp", False, 56),
    ],
)
def test_a_layer_launches_few_kernels(
    models: tuple[LoadedModel, LoadedModel], rule: str, compiled: bool, most: int
) -> None:
    """
    Given a trace of the residual stream by tokens
    I expect no more kernels per layer, forward and backward, than were counted.
    """
    counts = per_layer(models, rule, compiled)
    assert counts.total() <= most, counts.most_common()
    if compiled and rule != "gradient":
        assert counts.total() - 1 + FLASH_BACKWARD <= 30


def test_products_and_attention_are_among_them(models: tuple[LoadedModel, LoadedModel]) -> None:
    """The count is not low because something was not seen."""
    counts = per_layer(models, "attnlrp", compiled=True)
    assert counts["attention"] == counts["attention_backward"] == 1
    # Queries, keys and values in one, gate and up projection in one, and two more; both ways.
    assert counts["aten.mm.default"] == 8
