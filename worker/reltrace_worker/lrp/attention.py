"""Attention over a pack: several prompts in one sequence, none of which sees another.

======== ============================ ========================================================
kernel   used on                      how
======== ============================ ========================================================
varlen   CUDA, bfloat16 or float16    one flash kernel: ``torch.nn.attention.varlen``
sdpa     CPU; CUDA in float32         one SDPA call per run of prompts of equal length
======== ============================ ========================================================

The memory of both is linear in the pack. Neither uses a mask over the pack, so that values that
are not finite do not reach other prompts either. transformers calls them by a registered name,
and the layout of the pack arrives as the model keyword ``packing``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface

from reltrace_worker.lrp.deterministic import with_deterministic_backward
from reltrace_worker.lrp.sdpa import sdpa
from reltrace_worker.lrp.window import window_attention
from reltrace_worker.models.placement import to_device

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, slots=True)
class Packing:
    """The layout of a pack: prompts one after another in one sequence of N tokens."""

    # Tokens of each prompt. A run of prompts of equal length shares one SDPA call, so a pack that
    # is sorted by length needs the fewest calls.
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"a pack holds prompts of at least one token, not {self.lengths}")

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each prompt."""
        return (0, *accumulate(self.lengths))[:-1]

    @property
    def tokens(self) -> int:
        """N, the tokens of all prompts."""
        return sum(self.lengths)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Runs of prompts of equal length as (prompts, tokens of each)."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]


def positions(packing: Packing, device: torch.device) -> torch.Tensor:
    """Return the position ids of a pack: int64 [1, N], restarting at 0 with each prompt."""
    lengths = torch.tensor(packing.lengths)
    firsts = torch.tensor(packing.starts).repeat_interleave(lengths)
    return to_device((torch.arange(packing.tokens) - firsts)[None], device)


def _repeat_heads(states: torch.Tensor, times: int) -> torch.Tensor:
    return states.repeat_interleave(times, dim=1)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    grouped = group > 1
    if grouped and query.device.type == "cuda":
        # CUDA's fused kernel for float32 has no grouped heads.
        key, value = _repeat_heads(key, group), _repeat_heads(value, group)
        grouped = False
    runs = packing.runs
    sizes = [prompts * length for prompts, length in runs]
    # The backward pass of split is one concatenation; that of slices, a padded sum per slice.
    parts = (torch.split(states[0], sizes, dim=1) for states in (query, key, value))
    outputs = []
    for (prompts, length), *states in zip(runs, *parts, strict=True):
        q, k, v = (part.view(part.shape[0], prompts, length, -1).transpose(0, 1) for part in states)
        if window is not None and length > window:
            output = window_attention(q, k, v, window, scaling=scaling, grouped=grouped)
        else:
            output = sdpa(q, k, v, is_causal=length > 1, scale=scaling, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


varlen_attn: Callable[..., Any] = varlen.varlen_attn
# torch 2.11 has no grouped heads here.
_VARLEN_HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@lru_cache(maxsize=8)
def _cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return int32 [prompts + 1]: the first row of each prompt, and N."""
    return to_device(torch.tensor((0, *accumulate(lengths)), dtype=torch.int32), device)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1 and not _VARLEN_HAS_GROUPS:
        key, value = _repeat_heads(key, group), _repeat_heads(value, group)
    boundaries = _cumulative_lengths(packing.lengths, query.device)
    longest = max(packing.lengths)
    output = varlen_attn(
        *(states.squeeze(0).transpose(0, 1) for states in (query, key, value)),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        # Visible tokens to the left and to the right; (-1, 0) is plain causal attention.
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": True} if group > 1 and _VARLEN_HAS_GROUPS else {}),
    )
    return with_deterministic_backward(output)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to compute attention over a pack."""

    # In a result's provenance.
    name: str
    # From query, key and value, [1, heads or key-value heads, N, head size], the packing, the
    # factor of the scores and the sliding window to [N, heads, head size].
    function: Callable[..., torch.Tensor]
    # Rows of float32, as wide as all heads, that its backward pass allocates per prompt.
    padding: int = 0


SDPA = Kernel("sdpa", _sdpa)
# dQ is summed up in blocks of 128 rows (mha_varlen_bwd in torch's flash_api.cpp).
VARLEN = Kernel("varlen", _varlen, padding=128)


def kernel_for(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """Return the kernel for tensors of this device, dtype and head size."""
    # What flash attention takes (torch 2.13, aten/src/ATen/native/transformers/cuda/flash_attn).
    takes_varlen = (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.bfloat16, torch.float16)
        and head_size <= 256
        and head_size % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    return VARLEN if takes_varlen else SDPA


def packed_attention(
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
    """Causal attention inside each prompt of a pack, as transformers calls it.

    `query` is [1, heads, N, head size], the output [1, N, heads, head size]. `sliding_window`
    counts the tokens that a token sees, itself included.
    """
    if attention_mask is not None or dropout != 0.0:
        raise ValueError("packed attention takes neither a mask nor dropout")
    if softcap is not None:
        raise ValueError("packed attention does not cap the scores")
    kernel = kernel_for(query.device, query.dtype, query.shape[-1])
    return kernel.function(query, key, value, packing, scaling, sliding_window)[None], None


def register_attention(name: str, function: AttentionFunction) -> None:
    """Register an attention implementation that needs no mask with transformers.

    Under a name that `AttentionMaskInterface` does not know, transformers makes no mask; for one
    that it knows, it also looks for packed prompts in the position ids, and waits for the device.
    """
    AttentionInterface.register(name, function)
