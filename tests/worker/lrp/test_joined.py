"""Joined projections: the numbers of the layers apart, from one product."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference.loaded import DEVICE, Checkpoints
from reltrace_worker.engine import Engine
from reltrace_worker.engine.sites import SITES
from reltrace_worker.lrp import RULES
from reltrace_worker.lrp.joined import join_linear_layers
from reltrace_worker.models import load_model
from reltrace_worker.types.jobs import Target, Term, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult
from torch import nn


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            self.add_module(name, nn.Linear(6, width, bias=bias))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (2,), (0, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_layers_apart(
    bias: bool, wanted: tuple[int, ...], side_by_side: bool
) -> None:
    """
    Given gradients of some outputs, apart or as parts of one tensor
    I expect what autograd makes of three layers.
    """
    torch.manual_seed(0)
    apart = Attention(bias)
    joined = copy.deepcopy(apart)
    assert join_linear_layers(joined) == 1
    x = torch.randn(1, 5, 6, requires_grad=True)
    outer = torch.randn(1, 5, 16).split((8, 4, 4), dim=-1)
    if not side_by_side:
        outer = tuple(part.clone() for part in outer)
    results = []
    for module in (apart, joined):
        outputs = module(x)
        chosen = [outputs[index] for index in wanted]
        (gradient,) = torch.autograd.grad(chosen, x, [outer[index] for index in wanted])
        results.append((*outputs, gradient))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_no_weight_is_kept_twice() -> None:
    module = Attention(bias=False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    join_linear_layers(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == 16 * 6 * 4


def test_a_layer_that_is_called_with_another_tensor_computes_for_itself() -> None:
    apart = Attention(bias=False)
    joined = copy.deepcopy(apart)
    join_linear_layers(joined)
    x, other = torch.randn(2, 1, 3, 6)
    joined.q_proj(x)
    assert torch.equal(joined.k_proj(other), apart.k_proj(other))
    # And after the first has been called again, with a pass that failed in between.
    joined.q_proj(other)
    torch.testing.assert_close(joined.v_proj(other), apart.v_proj(other))


def test_layers_of_another_kind_are_left_alone() -> None:
    class Quantized(nn.Linear):
        pass

    hooked, quantized, training, odd = (Attention(bias=False) for _ in range(4))
    hooked.k_proj.register_forward_pre_hook(lambda *_: None)
    quantized.add_module("v_proj", Quantized(6, 4, bias=False).requires_grad_(False))
    training.q_proj.requires_grad_(True)
    odd.add_module("k_proj", nn.Linear(6, 4, bias=True).requires_grad_(False))
    for module in (hooked, quantized, training, odd):
        assert join_linear_layers(module) == 0


def jobs(rule: str) -> list[TraceJob]:
    found = []
    for ids in ((3, 1, 4, 1, 5), (9,), tuple(range(30))):
        targets = tuple(Target((Term(len(ids) - 1, token),)) for token in (7, 8))
        found.append(
            TraceJob(TokenizedPrompt(ids, ("",) * len(ids)), targets, tuple(SITES), "full", rule)
        )
    return found


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("kind", ["grouped", "qwen2", "gemma3"])
def test_every_site_is_what_it_is_apart(
    checkpoints: Checkpoints, kind: str, rule: str, checkpointing: Any
) -> None:
    plain = checkpoints.loaded(kind)
    # Another copy: what is joined stays so.
    joined = load_model(str(checkpoints.folder(kind)), dtype="float32", device=DEVICE)
    assert join_linear_layers(joined.model) == 2 * plain.shape.layers
    wanted, ours = (Engine(each, checkpointing).run(jobs(rule)) for each in (plain, joined))
    for result, other in zip(ours, wanted, strict=True):
        assert isinstance(result, JobResult)
        assert isinstance(other, JobResult)
        for found, expected in zip(result.tensors, other.tensors, strict=True):
            largest = expected.values.abs().max()
            assert bool((found.values - expected.values).abs().max() <= 2e-5 * largest)
