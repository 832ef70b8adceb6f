"""Which kernel is chosen, and that all of them compute the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reltrace_worker.lrp import kernels
from reltrace_worker.lrp.attention import Packing, packed_attention
from reltrace_worker.lrp.kernels import KERNELS, kernel_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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


def test_without_varlen_in_torch_sdpa_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "varlen_attn", None)
    assert kernel_for(CUDA, torch.bfloat16, 64).name == "sdpa"


def test_this_torch_has_varlen_with_the_arguments_used() -> None:
    assert kernels.varlen_attn is not None


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
    outer = torch.randn(1, n, heads[0], size)

    def outcome(function: Any) -> tuple[torch.Tensor, ...]:
        output, weights = function(None, *states, None, packing=packing, scaling=scaling)
        assert weights is None
        assert output.shape == outer.shape
        return output, *torch.autograd.grad(output, states, outer)

    wanted = outcome(packed_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "varlen_attn", reference_varlen)
        found = {name: outcome(kernel.function) for name, kernel in KERNELS.items()}
        patch.setattr(kernels, "varlen_attn", reference_without_groups)
        found["varlen of torch 2.11"] = outcome(KERNELS["varlen"].function)
    for name, tensors in found.items():
        for ours, theirs in zip(tensors, wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), name


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_is_the_same_in_sdpa_and_varlen(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(kernels, "varlen_attn", reference_varlen)
    states = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    options: dict[str, Any] = {"packing": Packing((2, 7, 7)), "sliding_window": window}
    plain, _ = packed_attention(torch.nn.Identity(), *states, None, **options)
    varlen, _ = kernels.varlen_attention(torch.nn.Identity(), *states, None, **options)
    assert torch.allclose(plain, varlen, atol=1e-5)
    if window == 1:
        # A token that sees itself alone takes its own value.
        assert torch.allclose(varlen, states[2].transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout": 0.1}, "neither a mask nor dropout"), ({"softcap": 30.0}, "cap the scores")],
)
def test_what_a_kernel_can_not_do_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    state = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=message):
        KERNELS[name].function(
            torch.nn.Identity(), state, state, state, None, packing=Packing((2,)), **options
        )
