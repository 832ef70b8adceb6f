"""Keys and values of sequences that are decoded together, with room for the tokens to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

ROOM = 128
"""Columns that are allocated in advance: one copy of the cache in so many steps."""


class RowsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one decoder layer: a row per sequence, a column per token.

    The last column is the last token of every row; shorter rows are padded on their left, with
    zeros. A layer with a sliding `window` forgets the columns that no later token sees.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        # Columns that a later token sees besides its own.
        self._reach = None if window is None else window - 1
        # Columns so far, forgotten ones included.
        self._length = 0
        # Keys and values, [2, rows, heads, columns, head size], and how many columns are filled.
        self._buffer: torch.Tensor | None = None
        self._keys: torch.Tensor
        self._values: torch.Tensor
        self._filled = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = 2, *key_states.shape[:2], 0, key_states.shape[-1]
        self._hold(key_states.new_empty(shape), 0, 0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of the next tokens; return those that these tokens see."""
        if self._buffer is None:
            self.lazy_initialization(key_states, value_states)
        seen, columns = self._seen(self._length), key_states.shape[-2]
        if self._filled + columns > self._keys.shape[-2]:
            past = self.past
            moved = past.new_empty(*past.shape[:3], seen + columns + ROOM, past.shape[-1])
            moved[:, :, :, :seen] = past
            self._hold(moved, seen, self._length)
        first = self._filled
        self._filled, self._length = first + columns, self._length + columns
        # Few operations: there are as many layers, for each token.
        self._keys.narrow(2, first, columns).copy_(key_states)
        self._values.narrow(2, first, columns).copy_(value_states)
        seen += columns
        return (
            self._keys.narrow(2, self._filled - seen, seen),
            self._values.narrow(2, self._filled - seen, seen),
        )

    def _hold(self, buffer: torch.Tensor, filled: int, length: int) -> None:
        self._buffer, self._filled, self._length = buffer, filled, length
        self._keys, self._values = buffer.unbind()

    @property
    def buffer(self) -> torch.Tensor:
        assert self._buffer is not None
        return self._buffer

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def past(self) -> torch.Tensor:
        """What the next token sees of those before: [2, rows, heads, columns, head size]."""
        return self.buffer[:, :, :, self._filled - self._seen(self._length) : self._filled]

    def _seen(self, length: int) -> int:
        return length if self._reach is None else min(length, self._reach)

    def regroup(self, parts: Sequence[tuple[RowsLayer, torch.Tensor]], length: int) -> None:
        """Hold the given rows of some layers, this one or others, with `length` columns.

        Columns on the left are padding where a layer has fewer, and cut off where it has more:
        nobody's tokens must be there.
        """
        columns = self._seen(length)
        pasts = [(layer.past, rows) for layer, rows in parts]
        (first, _), count = pasts[0], sum(len(rows) for _, rows in pasts)
        heads, size = first.shape[2], first.shape[-1]
        moved = first.new_zeros(2, count, heads, columns + ROOM, size)
        start = 0
        for past, rows in pasts:
            kept = min(columns, past.shape[-2])
            past = past[:, :, :, past.shape[-2] - kept :]
            past = past if len(rows) == past.shape[1] else past[:, rows]
            moved[:, start : start + len(rows), :, columns - kept : columns] = past
            start += len(rows)
        self._hold(moved, columns, length)
        self.is_initialized = True

    def release(self) -> None:
        """Free the memory; the layer is of no use after that."""
        self._buffer = None
        del self._keys, self._values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns `update` will give, and the number of the first."""
        seen = self._seen(self._length)
        return seen + query_length, self._length - seen

    def get_seq_length(self) -> int:
        """Return the columns so far."""
        return self._length

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1


class RowsCache(Cache):
    """The keys and values of all layers of a model."""

    def __init__(self, config: Any) -> None:
        plain = DynamicCache(config=config).layers
        self._rows = [RowsLayer(getattr(layer, "sliding_window", None)) for layer in plain]
        super().__init__(list(self._rows))

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(layer.nbytes for layer in self._rows)

    def regroup(self, parts: Sequence[tuple[RowsCache, Sequence[int]]], length: int) -> None:
        """Hold the given rows of some caches; see `RowsLayer.regroup`."""
        # On the CPU: a cache may be on several devices.
        chosen = [(cache, torch.tensor(rows)) for cache, rows in parts]
        for number, layer in enumerate(self._rows):
            layer.regroup([(cache._rows[number], rows) for cache, rows in chosen], length)
            for cache, _ in chosen:
                if cache is not self:
                    # One layer after the other: never all of them twice.
                    cache._rows[number].release()
