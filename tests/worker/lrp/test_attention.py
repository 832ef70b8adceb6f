"""Attention over a pack against attention with an explicit mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reltrace_worker.lrp.attention import Packing, packed_attention, positions, sorted_by_length
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("lengths", [(5,), (1, 1, 4, 4, 4, 7), (6, 2, 6), (1,), (3, 17, 17)])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 6, 17])
def test_it_equals_attention_under_a_block_causal_mask(
    lengths: tuple[int, ...], heads: int, key_heads: int, window: int | None
) -> None:
    """Through a window, a token sees itself and the window - 1 tokens before it."""
    generator = torch.Generator().manual_seed(0)
    packing = Packing(lengths)
    n, size = packing.tokens, 8
    shapes = [(1, heads, n, size), (1, key_heads, n, size), (1, key_heads, n, size)]
    states = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    start = torch.randn((1, n, heads, size), generator=generator)

    output, weights = packed_attention(
        torch.nn.Identity(), *states, None, packing=packing, sliding_window=window, scaling=0.3
    )
    assert weights is None
    assert output.shape == (1, n, heads, size)
    gradients = torch.autograd.grad(output, states, start)

    prompt = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    mask = (prompt[:, None] == prompt[None]) & torch.ones(n, n).tril().bool()
    if window is not None:
        mask &= torch.ones(n, n).triu(1 - window).bool()
    query, key, value = states
    key, value = (t.repeat_interleave(heads // key_heads, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * 0.3
    expected = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-6)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, states, start), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5)


def test_a_mask_or_dropout_is_refused() -> None:
    state = torch.zeros(1, 1, 2, 4)
    packing = Packing((2,))
    with pytest.raises(ValueError, match="neither a mask nor dropout"):
        packed_attention(
            torch.nn.Identity(), state, state, state, torch.zeros(2, 2), packing=packing
        )
    with pytest.raises(ValueError, match="neither a mask nor dropout"):
        packed_attention(
            torch.nn.Identity(), state, state, state, None, packing=packing, dropout=0.1
        )


def test_capped_scores_are_refused() -> None:
    state = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="does not cap"):
        packed_attention(
            torch.nn.Identity(), state, state, state, None, packing=Packing((2,)), softcap=50.0
        )


def test_a_window_needs_no_mask_over_a_long_prompt() -> None:
    """
    Given a prompt of 4096 tokens and a window of 16
    If attention runs through the window, forward and backward
    I expect no tensor of the size of the prompt squared, nor near it.
    """
    length, window = 4096, 16
    states = [torch.zeros(1, 1, length, 4, requires_grad=True) for _ in range(3)]
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Sizes():
        output, _ = packed_attention(
            torch.nn.Identity(), *states, None, packing=Packing((length,)), sliding_window=window
        )
        output.sum().backward()
    assert output.shape == (1, length, 1, 4)
    assert largest <= length * 2 * window


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_a_pack_without_tokens_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Packing(lengths)


def test_the_layout_of_a_pack() -> None:
    packing = Packing((1, 2, 2, 3))
    assert packing.starts == (0, 1, 3, 5)
    assert packing.tokens == 8
    assert packing.runs == [(1, 1), (2, 2), (1, 3)]
    assert positions(packing, torch.device("cpu")).tolist() == [[0, 0, 1, 0, 1, 0, 1, 2]]
    assert sorted_by_length([3, 1, 2, 1]) == [1, 3, 2, 0]
