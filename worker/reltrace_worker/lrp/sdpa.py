"""``scaled_dot_product_attention`` as passes call it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from reltrace_worker.lrp.deterministic import with_deterministic_backward

# On a CPU in bfloat16: keys times head size up to which the backward pass is faster in float32.
# torch calls one matrix product per block of 32 rows or so, and oneDNN, which computes those of
# bfloat16, takes longer to be called than MKL. Figures in tests/bench/README.md.
_FLOAT32_PAYS_TO = 1 << 14


class _BackwardInFloat32(torch.autograd.Function):
    """Attention on a CPU: forward as it is called, backward in float32.

    The graph keeps what torch's own function keeps: tensors of the model's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        # What scaled_dot_product_attention calls; the sums of the softmax are needed besides.
        output: torch.Tensor
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, log_sums, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Any, ...]:
        *states, log_sums, mask = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(tensor.float() for tensor in (outer[0], *states)),
            log_sums,
            0.0,
            ctx.is_causal,
            attn_mask=None if mask is None else mask.float(),
            scale=ctx.scale,
        )
        return *(gradient.to(outer[0].dtype) for gradient in gradients), None, None, None


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Run ``scaled_dot_product_attention``.

    Its backward pass is deterministic on CUDA, and on a CPU in float32 where bfloat16 would take
    longer: for short prompts.
    """
    work = key.shape[-2] * key.shape[-1]
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and work <= _FLOAT32_PAYS_TO:
        short: torch.Tensor = _BackwardInFloat32.apply(  # type: ignore[no-untyped-call]
            query, key, value, attn_mask, is_causal, scale
        )
        return short
    return with_deterministic_backward(
        scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    )
