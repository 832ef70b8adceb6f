"""Rows of keys and values, against those of transformers' caches."""

from __future__ import annotations

import random

import pytest
import torch
from reltrace_worker.engine.kv_cache import ROOM, RowsLayer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@pytest.mark.parametrize("window", [None, 1, 7])
def test_tokens_see_what_they_see_in_transformers(window: int | None) -> None:
    chosen, source = random.Random(1), torch.Generator().manual_seed(1)
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    ours = RowsLayer(window)
    for _ in range(60):
        columns = chosen.choice((1, 1, 1, 2, 9))
        assert ours.get_mask_sizes(columns) == theirs.get_mask_sizes(columns)
        keys, values = torch.randn(2, 3, 2, columns, 4, generator=source)
        seen, wanted = ours.update(keys, values), theirs.update(keys, values)
        for one, other in zip(seen, wanted, strict=True):
            # transformers' layer keeps everything at a window of one.
            assert torch.equal(one, other[:, :, -one.shape[2] :])
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("window", [None, 64])
def test_keys_are_not_copied_with_every_token(window: int | None) -> None:
    """of 1,000 steps one in 129 copies the keys and values; the others write one column."""
    layer, places = RowsLayer(window), set()
    held = []
    for _ in range(1000):
        layer.update(*torch.zeros(2, 1, 1, 1, 4))
        if layer.buffer.data_ptr() not in places:
            held.append(layer.buffer)
            places.add(layer.buffer.data_ptr())
    assert len(held) == -(-1000 // (ROOM + 1))
    assert layer.nbytes <= 2 * 4 * 4 * ((window or 1000) + 2 * ROOM)
