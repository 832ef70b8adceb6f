"""Attention through a sliding window, in work and memory linear in the length of a prompt."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import pad

from reltrace_worker.lrp.reproducible import sdpa


def _blocks(states: torch.Tensor, window: int) -> torch.Tensor:
    """Cut [P, heads, m * window, size] into [P, m, heads, window, size]."""
    prompts, heads, _, size = states.shape
    return states.view(prompts, heads, -1, window, size).transpose(1, 2)


def _own_and_previous(states: torch.Tensor, window: int) -> torch.Tensor:
    """From [P, heads, (m + 1) * window, size] to [P * m, heads, 2 * window, size]."""
    blocks = _blocks(states, window)
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=3).flatten(0, 1)


@lru_cache(maxsize=2)
def _mask(window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what is added to the scores, [window, 2 * window]: one for all layers of a pass.

    As numbers: of truth values every layer would keep a copy in numbers for its backward pass.
    """
    i = torch.arange(window, device=device)[:, None]
    j = torch.arange(2 * window, device=device)[None]
    # Key j stands at j - window, counted from the block's first query.
    seen = (j > i) & (j <= i + window)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scaling: float | None = None,
    grouped: bool = False,
) -> torch.Tensor:
    """Causal attention of prompts longer than a window: a token sees itself and what precedes it.

    The window counts the token itself, as transformers counts it: query i sees the keys
    i - window + 1 to i. Cut into blocks as long as the window, a block of queries sees keys of
    its own block and of the one before alone, under one mask of [window, 2 * window].

    Parameters
    ----------
    query
        [P prompts, heads, T, head size], T > `window`.
    key, value
        [P, key-value heads, T, head size].
    window
        Tokens that a token sees, at least 1.
    scaling
        Factor of the scores; None: one over the root of the head size.
    grouped
        There are fewer key-value heads than heads.

    Returns
    -------
    torch.Tensor
        [P, heads, T, head size].
    """
    prompts, heads, length, size = query.shape
    # Nothing is out of reach of the first block; it needs no mask.
    first_query, rest_query = torch.split(query, [window, length - window], dim=2)
    first_key, first_value = key[:, :, :window], value[:, :, :window]
    first = sdpa(
        first_query, first_key, first_value, is_causal=window > 1, scale=scaling, enable_gqa=grouped
    )
    # What pads the last block follows every query that counts, so that none of them sees it.
    padding = (0, 0, 0, -length % window)
    rest = sdpa(
        _blocks(pad(rest_query, padding), window).flatten(0, 1),
        _own_and_previous(pad(key, padding), window),
        _own_and_previous(pad(value, padding), window),
        attn_mask=_mask(window, query.dtype, query.device),
        scale=scaling,
        enable_gqa=grouped,
    )
    rest = rest.view(prompts, -1, heads, window, size).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : length - window]], dim=2)
