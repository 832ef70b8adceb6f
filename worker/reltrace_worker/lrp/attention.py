"""Attention over a pack: several prompts in one sequence, none of which sees another.

The kernel is registered with transformers' attention registry under one name per rule; the rules
wrap it with lxt's functions. The layout of the pack reaches it as the model keyword ``packing``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from reltrace_worker.lrp.reproducible import sdpa
from reltrace_worker.lrp.window import window_attention

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, slots=True)
class Packing:
    """The layout of a pack: prompts behind one another in one sequence of N tokens.

    Parameters
    ----------
    lengths
        Tokens of each prompt, in order. Neighbours of equal length share one kernel call, so a
        pack that is sorted by length needs fewest calls.
    """

    lengths: tuple[int, ...]
    cache: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What kernels derive from the layout, computed in the first layer and kept for the others."""

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
        """Neighbours of equal length as (prompts, tokens of each)."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]


def repeat_heads(states: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each key-value head for the heads that it serves."""
    return states.repeat_interleave(times, dim=1)


def check_arguments(
    attention_mask: torch.Tensor | None, dropout: float, softcap: float | None
) -> None:
    """Refuse what no kernel over a pack takes.

    Raises
    ------
    ValueError
        There is a mask, dropout, or a cap of the scores.
    """
    if attention_mask is not None or dropout != 0.0:
        raise ValueError("packed attention takes neither a mask nor dropout")
    if softcap is not None:
        raise ValueError("packed attention does not cap the scores")


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
    """Causal attention inside each prompt of a pack, without a mask over the pack.

    Parameters
    ----------
    module
        The attention module that calls.
    query
        [1, heads, N, head size].
    key, value
        [1, key-value heads, N, head size]; each key-value head serves
        ``heads / key-value heads`` heads.
    attention_mask
        None: `packing` says what may see what.
    packing
        Layout of the N tokens.
    scaling
        Factor of the scores; None: one over the root of the head size.
    dropout
        0; anything else is refused, a trace is deterministic.
    sliding_window
        Tokens that a token of this layer sees, itself included; None: all that precede it.
    softcap
        None; anything else is refused, no supported family passes it.

    Returns
    -------
    tuple
        [1, N, heads, head size], and None for the attention weights.
    """
    check_arguments(attention_mask, dropout, softcap)
    heads, key_heads = query.shape[1], key.shape[1]
    grouped = heads != key_heads
    if grouped and query.device.type == "cuda":
        # Of CUDA's fused kernels, the one for float32 takes no grouped heads.
        key = repeat_heads(key, heads // key_heads)
        value = repeat_heads(value, heads // key_heads)
        grouped = False
    runs = packing.runs
    sizes = [prompts * length for prompts, length in runs]
    # split, not slices: its backward is one concatenation, theirs a padded sum per slice.
    parts = zip(
        runs,
        torch.split(query[0], sizes, dim=1),
        torch.split(key[0], sizes, dim=1),
        torch.split(value[0], sizes, dim=1),
        strict=True,
    )
    outputs = []
    for (prompts, length), *states in parts:
        q, k, v = (part.view(part.shape[0], prompts, length, -1).transpose(0, 1) for part in states)
        if sliding_window is not None and length > sliding_window:
            output = window_attention(q, k, v, sliding_window, scaling=scaling, grouped=grouped)
        else:
            output = sdpa(q, k, v, is_causal=length > 1, scale=scaling, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand for transformers' mask of N x N: the kernel takes the layout instead."""


def register_attention(name: str, function: AttentionFunction) -> None:
    """Make `function` known to transformers as attention implementation `name`, without a mask."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _no_mask)


def positions(packing: Packing, device: torch.device) -> torch.Tensor:
    """Return the position ids of a pack: int64 [1, N], restarting at 0 with each prompt."""
    return torch.cat([torch.arange(length) for length in packing.lengths])[None].to(device)


def sorted_by_length(lengths: Sequence[int]) -> list[int]:
    """Return the order of prompts in which neighbours of equal length stand together."""
    return sorted(range(len(lengths)), key=lambda index: lengths[index])
