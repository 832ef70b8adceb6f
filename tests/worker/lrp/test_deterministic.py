"""Deterministic while a node runs, and not longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.loaded import Checkpoints
from reltrace_worker.lrp import RULES, apply_rule
from reltrace_worker.lrp.deterministic import run_deterministically, with_deterministic_backward


class Seen(torch.autograd.Function):
    """Notes whether torch is deterministic while its backward pass runs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, notes: list[bool], fails: bool) -> torch.Tensor:
        ctx.notes, ctx.fails = notes, fails
        return x * 2

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None]:
        ctx.notes.append(torch.are_deterministic_algorithms_enabled())
        if ctx.fails:
            raise RuntimeError("out of memory")
        return outer[0] * 2, None, None


def chain(notes: list[bool], fails: bool = False) -> torch.Tensor:
    """Of three nodes the middle one is to be deterministic."""
    x = torch.ones(2, requires_grad=True)
    first: torch.Tensor = Seen.apply(x, notes, False)  # type: ignore[no-untyped-call]
    second: torch.Tensor = Seen.apply(first, notes, fails)  # type: ignore[no-untyped-call]
    run_deterministically(second.grad_fn)
    third: torch.Tensor = Seen.apply(second, notes, False)  # type: ignore[no-untyped-call]
    return third.sum()


def test_one_node_alone_is_deterministic() -> None:
    notes: list[bool] = []
    total = chain(notes)
    total.backward(retain_graph=True)
    assert notes == [False, True, False]
    # Once more through the same graph, as several targets do.
    total.backward()
    assert notes == [False, True, False] * 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_was_set_before_is_set_after() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        chain([]).backward()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_node_that_fails_leaves_nothing_set(checkpoints: Checkpoints) -> None:
    """
    Given a pass whose backward fails while a kernel runs, for memory, say
    I expect the next pass to find torch as it was.
    """
    model = checkpoints.loaded("grouped").model
    with pytest.raises(RuntimeError, match="out of memory"), apply_rule(model, RULES["attnlrp"]):
        chain([], fails=True).backward()
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_a_cpu_nothing_is_done() -> None:
    output = torch.ones(1, requires_grad=True) * 2
    assert with_deterministic_backward(output) is output
    output.backward()
    assert not torch.are_deterministic_algorithms_enabled()
