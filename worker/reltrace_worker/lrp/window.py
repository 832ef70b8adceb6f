"""Sliding-window attention with work and memory linear in the length of a prompt."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import pad

from reltrace_worker.lrp.sdpa import sdpa


def _blocks(states: torch.Tensor, window: int) -> torch.Tensor:
    """Cut [P, heads, m * window, size] into [P, m, heads, window, size]."""
    prompts, heads, _, size = states.shape
    return states.view(prompts, heads, -1, window, size).transpose(1, 2)


def _with_previous_block(states: torch.Tensor, window: int) -> torch.Tensor:
    """From [P, heads, (m + 1) * window, size] to [P * m, heads, 2 * window, size]."""
    blocks = _blocks(states, window)
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=3).flatten(0, 1)


@lru_cache(maxsize=2)
def _mask(window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the additive mask of the scores, [window, 2 * window], shared by all layers.

    Of a boolean mask, SDPA would keep a converted copy per layer for the backward pass.
    """
    i = torch.arange(window, device=device)[:, None]
    j = torch.arange(2 * window, device=device)[None]
    # Key j has position j - window relative to the first query of the block.
    visible = (j > i) & (j <= i + window)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scaling: float | None = None,
    grouped: bool = False,
) -> torch.Tensor:
    """Causal attention in which query i sees the keys i - window + 1 to i.

    `query` is [P prompts, heads, T, head size] with T > `window`, `key` and `value` have fewer
    heads if `grouped`. Queries are cut into blocks of `window` tokens: a block sees keys of itself
    and of the block before it only, under one mask of [window, 2 * window].
    """
    prompts, heads, length, size = query.shape
    # In the first block every earlier key is inside the window: plain causal attention.
    first_query, rest_query = torch.split(query, [window, length - window], dim=2)
    first_key, first_value = key[:, :, :window], value[:, :, :window]
    first = sdpa(
        first_query, first_key, first_value, is_causal=window > 1, scale=scaling, enable_gqa=grouped
    )
    # The padding of the last block comes after every real query, so none of them sees it.
    padding = (0, 0, 0, -length % window)
    rest = sdpa(
        _blocks(pad(rest_query, padding), window).flatten(0, 1),
        _with_previous_block(pad(key, padding), window),
        _with_previous_block(pad(value, padding), window),
        attn_mask=_mask(window, query.dtype, query.device),
        scale=scaling,
        enable_gqa=grouped,
    )
    rest = rest.view(prompts, -1, heads, window, size).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : length - window]], dim=2)
