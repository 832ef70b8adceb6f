"""Attention in bfloat16 on a CPU: its numbers against float64, and where it computes in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reltrace_worker.lrp import sdpa as module
from reltrace_worker.lrp.attention import Packing, packed_attention
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Formats(TorchDispatchMode):
    """Notes the dtypes in which the kernels of attention are called, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (FORWARD, BACKWARD):
            self.seen.append(("forward" if func is FORWARD else "backward", args[0].dtype))
        return func(*args, **(kwargs or {}))


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...],
    window: int | None,
) -> torch.Tensor:  # fmt: skip
    """The definition, in float64, over a pack: [1, N, heads, size]."""
    query, key, value = query.double(), key.double(), value.double()
    n = query.shape[2]
    prompt = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    seen = (prompt[:, None] == prompt[None]) & torch.ones(n, n).tril().bool()
    if window is not None:
        seen &= torch.ones(n, n).triu(1 - window).bool()
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ value).transpose(1, 2)


def states(n: int, heads: tuple[int, int], size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    counts = (heads[0], heads[1], heads[1])
    return [
        torch.randn((1, count, n, size), generator=generator).bfloat16().requires_grad_()
        for count in counts
    ]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [(1,), (3, 7, 7), (40, 65)])
def test_short_prompts_have_the_gradients_of_float64(
    lengths: tuple[int, ...], heads: tuple[int, int], window: int | None
) -> None:
    """
    Given prompts in bfloat16
    If attention runs over a pack of them, forward and backward, through a window or without
    I expect the numbers of the definition, each rounded to bfloat16 where it is kept: within
    2**-7 of the largest.
    """
    packing = Packing(lengths)
    inputs = states(packing.tokens, heads, 16)
    start = torch.randn((1, packing.tokens, heads[0], 16)).bfloat16()
    with Formats() as formats:
        output, _ = packed_attention(
            torch.nn.Identity(), *inputs, None, packing=packing, sliding_window=window
        )
        gradients = torch.autograd.grad(output, inputs, start)
    calls = set(formats.seen)
    assert calls == {("forward", torch.bfloat16), ("backward", torch.float32)}
    expected = exact(*inputs, lengths, window)
    wanted = torch.autograd.grad(expected, inputs, start.double())
    for ours, reference in zip((output, *gradients), (expected, *wanted), strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.detach().double() - reference.detach()).abs().max()
        assert float(error) <= 2**-7 * float(reference.detach().abs().max()) + 1e-5


@pytest.mark.parametrize(
    ("dtype", "length", "backward"),
    [
        (torch.float32, 64, torch.float32),
        (torch.bfloat16, 256, torch.float32),
        (torch.bfloat16, 257, torch.bfloat16),
    ],
)
def test_long_prompts_compute_in_their_own_format(
    dtype: torch.dtype, length: int, backward: torch.dtype
) -> None:
    inputs = [state.detach().to(dtype).requires_grad_() for state in states(length, (2, 1), 64)]
    with Formats() as formats:
        output = module.sdpa(*inputs, is_causal=True, enable_gqa=True)
        torch.autograd.grad(output.sum(), inputs)
    assert formats.seen == [("forward", dtype), ("backward", backward)]


def test_the_graph_of_a_short_prompt_keeps_no_float32_but_the_sums() -> None:
    """
    Given a prompt in bfloat16
    If attention runs forward
    I expect what the memory of a pass is planned with: states and output as they are, and one
    float32 per head and token.
    """
    inputs = states(32, (6, 2), 16)
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.sdpa(*inputs, is_causal=True, enable_gqa=True)
    assert sum(tensor.nbytes for tensor in kept) == 32 * (2 * (6 + 2 + 2 + 6) * 16 + 4 * 6)
