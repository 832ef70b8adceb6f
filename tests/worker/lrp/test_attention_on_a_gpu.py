"""The kernels of a GPU against attention in float64, prompt by prompt."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from reltrace_worker.lrp.attention import SDPA, VARLEN, Kernel, Packing, kernel_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = (1, 1, 3, 40, 40, 127, 128, 129, 300, 513)


def exact(
    states: list[torch.Tensor], lengths: tuple[int, ...], window: int | None, scaling: float | None
) -> torch.Tensor:
    """Attention by its formula, [1, N, heads, head size], each prompt on its own."""
    query, key, value = states
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    bounds = torch.tensor((0, *lengths)).cumsum(0).tolist()
    outputs = []
    for start, stop in pairwise(bounds):
        q, k, v = (t[0, :, start:stop] for t in (query, key, value))
        n = stop - start
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen &= torch.ones_like(seen).triu(1 - window)
        scores = q @ k.transpose(-1, -2) * (scaling or q.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("window", [None, 1, 20, 200])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 8, 64), (8, 2, 128), (6, 1, 16)])
@pytest.mark.parametrize(
    ("kernel", "dtype", "error"),
    [
        (VARLEN, torch.bfloat16, 2e-2),
        (SDPA, torch.bfloat16, 2e-2),
        (SDPA, torch.float32, 1e-5),
    ],
)
def test_values_and_gradients(
    kernel: Kernel, dtype: torch.dtype, error: float, heads: int, key_heads: int, size: int,
    window: int | None,
) -> None:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    n = sum(LENGTHS)
    rough = [
        torch.randn(1, h, n, size, generator=generator, device="cuda", dtype=dtype)
        for h in (heads, key_heads, key_heads)
    ]
    outer = torch.randn(1, n, heads, size, generator=generator, device="cuda", dtype=dtype)
    assert kernel is SDPA or kernel_for(outer.device, dtype, size) is VARLEN
    for states in rough:
        states.requires_grad_()
    ours = kernel.function(*rough, Packing(LENGTHS), 0.2, window)[None]
    # The same inputs, so that what differs is the kernel's own rounding.
    fine = [states.detach().double().requires_grad_() for states in rough]
    wanted = exact(fine, LENGTHS, window, 0.2)
    found = (ours, *torch.autograd.grad(ours, rough, outer))
    references = (wanted, *torch.autograd.grad(wanted, fine, outer.double()))
    for what, left, right in zip(("output", "dq", "dk", "dv"), found, references, strict=True):
        relative = float((left.double() - right).norm() / right.norm())
        if what in ("dq", "dk") and window == 1:
            # One token sees itself alone: its score does not matter.
            assert float(left.abs().max()) < 1e-2
            continue
        assert relative < error, what
