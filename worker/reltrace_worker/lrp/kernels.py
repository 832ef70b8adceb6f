"""The attention kernels, and which of them a device and a number format get.

======== ============================ ========================================================
name     where                        how
======== ============================ ========================================================
varlen   CUDA, bfloat16 or float16    one flash kernel over the pack:
                                      ``torch.nn.attention.varlen``
sdpa     CPU; CUDA in float32         one SDPA call per run of prompts of equal length
======== ============================ ========================================================

Both need memory that is linear in the pack, and in both no prompt sees another: not even numbers
that are not finite pass from one to the next, which they do where a mask multiplies them by zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reltrace_worker.lrp.attention import (
    AttentionFunction,
    Packing,
    check_arguments,
    packed_attention,
    repeat_heads,
)
from reltrace_worker.lrp.reproducible import in_fixed_order

# What flash attention takes (torch 2.13, aten/src/ATen/native/transformers/cuda/flash_attn).
_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_VARLEN_LARGEST_HEAD = 256
_VARLEN_CAPABILITY = (8, 0)
# Where dQ is summed up, rounded up to blocks (mha_varlen_bwd in flash_api.cpp there).
_VARLEN_PADDING = 128


def _find_varlen() -> Callable[..., Any] | None:
    """Return torch's kernel where this torch has it with the arguments used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Callable[..., Any] = varlen_attn
    # torch 2.10 had no windows (and so another way to say causal) and no scale.
    return function if {"window_size", "scale"} <= _parameters(function) else None


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


varlen_attn = _find_varlen()


def _boundaries(packing: Packing, device: torch.device) -> torch.Tensor:
    """Return first row of each prompt and the end of the last, int32 [prompts + 1]."""
    key = ("boundaries", device)
    if key not in packing.cache:
        rows = (*packing.starts, packing.tokens)
        packing.cache[key] = torch.tensor(rows, dtype=torch.int32, device=device)
    found: torch.Tensor = packing.cache[key]
    return found


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a pack in one flash kernel of variable length.

    Parameters and result are those of :func:`reltrace_worker.lrp.attention.packed_attention`.
    """
    check_arguments(attention_mask, dropout, softcap)
    assert varlen_attn is not None
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _parameters(varlen_attn):
            options["enable_gqa"] = True
        else:
            # torch before 2.12.
            group = query.shape[1] // key.shape[1]
            key, value = (repeat_heads(states, group) for states in (key, value))
    boundaries, longest = _boundaries(packing, query.device), max(packing.lengths)
    output = varlen_attn(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        # Tokens to the left and right of one's own: (-1, 0) is plain causal attention.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    return in_fixed_order(output).unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute attention over a pack.

    Parameters
    ----------
    name
        In a result's provenance.
    takes
        Whether it takes tensors of a device, a dtype and a head size.
    function
        The kernel.
    padding
        Rows, as wide as all heads and in float32, that its backward pass needs for each prompt of
        a pack beside those of its tokens.
    """

    name: str
    takes: Callable[[torch.device, torch.dtype, int], bool]
    function: AttentionFunction
    padding: int = 0


def _varlen_takes(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in _VARLEN_DTYPES
        and head_size <= _VARLEN_LARGEST_HEAD
        and head_size % 8 == 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _VARLEN_CAPABILITY
    )


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("varlen", _varlen_takes, varlen_attention, _VARLEN_PADDING),
        Kernel("sdpa", lambda device, dtype, size: True, packed_attention),
    )
}
"""In order of preference: the first that takes the tensors is used."""


def kernel_for(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """Return the kernel for tensors of this device, dtype and head size."""
    return next(k for k in KERNELS.values() if k.takes(device, dtype, head_size))


def attention(
    module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention over a pack with the kernel for the query's device, dtype and size."""
    kernel = kernel_for(query.device, query.dtype, query.shape[-1])
    return kernel.function(module, query, *args, **kwargs)
