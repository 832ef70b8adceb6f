"""Attention over a pack against attention with an explicit mask; which kernel is chosen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace_worker.lrp import attention
from reltrace_worker.lrp.attention import (
    SDPA,
    VARLEN,
    Kernel,
    Packing,
    kernel_for,
    packed_attention,
    positions,
)
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = (SDPA, VARLEN)


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


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "capability", "name"),
    [
        (CPU, torch.float32, 64, (0, 0), "sdpa"),
        (CPU, torch.bfloat16, 64, (0, 0), "sdpa"),
        (CUDA, torch.bfloat16, 64, (9, 0), "varlen"),
        (CUDA, torch.bfloat16, 256, (8, 0), "varlen"),
        (CUDA, torch.float32, 64, (9, 0), "sdpa"),
        (CUDA, torch.bfloat16, 320, (9, 0), "sdpa"),
        (CUDA, torch.bfloat16, 100, (9, 0), "sdpa"),
        (CUDA, torch.bfloat16, 64, (7, 5), "sdpa"),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int],
    name: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert kernel_for(device, dtype, head_size).name == name


def reference_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's documented semantics of ``varlen_attn``, prompt by prompt."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    bounds = cu_seq_q.tolist()
    assert bounds == cu_seq_k.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    assert max_q == max_k == max(lengths)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    outputs = []
    for start, stop in pairwise(bounds):
        q, k, v = (t[start:stop].transpose(0, 1) for t in (query, key, value))
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        place = torch.arange(stop - start)
        ahead = place[None] - place[:, None]
        seen = (ahead <= right) & (ahead >= (-left if left >= 0 else -(stop - start)))
        scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def reference_without_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rows: Any, scale: Any,
    window_size: Any,
) -> torch.Tensor:  # fmt: skip
    """The same of torch 2.11, which knows no grouped heads."""
    return reference_varlen(query, key, value, *rows, scale=scale, window_size=window_size)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple),
    heads=st.sampled_from([(4, 4), (6, 2), (4, 1)]),
    scaling=st.sampled_from([None, 0.7]),
)
def test_all_kernels_compute_the_same(
    lengths: tuple[int, ...], heads: tuple[int, int], scaling: float | None
) -> None:
    torch.manual_seed(0)
    packing, size = Packing(lengths), 8
    n = packing.tokens
    states = [torch.randn(1, h, n, size, requires_grad=True) for h in (heads[0], *heads[1:] * 2)]
    outer = torch.randn(n, heads[0], size)

    def outcome(kernel: Kernel) -> tuple[torch.Tensor, ...]:
        output = kernel.function(*states, packing, scaling, None)
        assert output.shape == outer.shape
        return output, *torch.autograd.grad(output, states, outer)

    wanted = outcome(SDPA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", reference_varlen)
        patch.setattr(attention, "_VARLEN_HAS_GROUPS", True)
        found = {kernel.name: outcome(kernel) for kernel in KERNELS}
        patch.setattr(attention, "varlen_attn", reference_without_groups)
        patch.setattr(attention, "_VARLEN_HAS_GROUPS", False)
        found["varlen of torch 2.11"] = outcome(VARLEN)
    for name, tensors in found.items():
        for ours, theirs in zip(tensors, wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), name


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_is_the_same_in_sdpa_and_varlen(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    states = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    plain, varlen = (k.function(*states, Packing((2, 7, 7)), None, window) for k in KERNELS)
    assert torch.allclose(plain, varlen, atol=1e-5)
    if window == 1:
        # A token that sees itself alone takes its own value.
        assert torch.allclose(varlen, states[2][0].transpose(0, 1), atol=1e-6)
