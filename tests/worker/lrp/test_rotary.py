"""Rotation and the factors of a rule in one function, against transformers and autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reltrace_worker.lrp import RULES
from reltrace_worker.lrp.rotary import (
    Unrotated,
    attention_states,
    forward_without_rotation,
    held_attention_states,
)
from reltrace_worker.models import FAMILIES
from torch import nn

FACTORS = (0.25, 0.25, 0.5)


def plain_rotation(family: str) -> Callable[..., Any]:
    module = importlib.import_module(FAMILIES[family].attention.__module__)
    found: Callable[..., Any] = module.apply_rotary_pos_emb
    return found


def states(dtype: torch.dtype, rotated: int = 8) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries of four heads, keys and values of two, laid out as projections give them; tables."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = [normal(1, 5, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    angles = torch.randn(1, 5, rotated, generator=generator)
    return found, [angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize(
    ("family", "rotated"), [*((family, 8) for family in FAMILIES), ("phi3", 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rotates_as_transformers_does(family: str, dtype: torch.dtype, rotated: int) -> None:
    """
    Given states of a family's attention, and rotary tables for a whole or half a head
    If they are rotated
    I expect the bits of the family's own function, and its gradients times the factors.
    """
    (query, key, value), tables = states(dtype, rotated)
    wanted = *plain_rotation(family)(query, key, *tables), value
    ours = attention_states(Unrotated(query, *tables), Unrotated(key, *tables), value, FACTORS)
    outer = [torch.randn_like(tensor) for tensor in wanted]
    for left, right in zip(ours, wanted, strict=True):
        assert torch.equal(left, right)
    gradients = torch.autograd.grad(ours, (query, key, value), outer)
    exact = torch.autograd.grad(wanted, (query, key, value), outer)
    for gradient, other, factor in zip(gradients, exact, FACTORS, strict=True):
        assert gradient.dtype == dtype
        # Autograd rounds the sum of both halves in another place.
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(gradient, factor * other, rtol=0, atol=tolerance)


def test_held_queries_and_keys_get_no_gradient() -> None:
    (query, key, value), tables = states(torch.float32)
    wanted = plain_rotation("llama")(query, key, *tables)
    q, k, v = held_attention_states(Unrotated(query, *tables), Unrotated(key, *tables), value)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])
    assert not q.requires_grad
    assert not k.requires_grad
    outer = torch.randn_like(v)
    (gradient,) = torch.autograd.grad(v, value, outer)
    assert torch.equal(gradient, outer)


def test_a_layer_without_rotary_embeddings_gets_the_factors() -> None:
    tensors, _ = states(torch.float32)
    ours = attention_states(*tensors, FACTORS)
    for found, tensor, factor in zip(ours, tensors, FACTORS, strict=True):
        (gradient,) = torch.autograd.grad(found.sum(), tensor)
        assert torch.equal(gradient, torch.full_like(tensor, factor))


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_attention_hands_on_unrotated_states(family: str, rule: str) -> None:
    """The name that is replaced is the one that the class calls."""
    kind = FAMILIES[family].attention
    assert "apply_rotary_pos_emb" in kind.forward.__code__.co_names
    assert RULES[rule].patches[kind][0] == "forward"


def test_a_class_without_rotation_computes_what_it_did() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor, *, factor: float = 2.0) -> torch.Tensor:
            return x * factor

    assert forward_without_rotation(Own)(None, torch.ones(())) == 2
