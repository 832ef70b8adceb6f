"""Where a corpus is cut into slices: by the number of prompts alone, so that all runs cut alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from reltrace._trace import Array

_FIRST = 16
"""Prompts of the first slices: on a small model on two cores, some seconds."""


def sizes(most: int) -> Iterator[int]:
    """Yield how many prompts each slice has, without end.

    The first ones are small, so that something is done soon; later ones are half as large as all
    before them, up to `most`: a large model's slice is hundreds of megabytes, however few prompts
    it has.
    """
    before = 0
    while True:
        size = min(most, max(_FIRST, before // 2))
        yield size
        before += size


def firsts(count: int, most: int) -> Array:
    """Return the number of the first prompt of each of so many slices, and of the one that follows.

    Returns
    -------
    ndarray
        int64 [count + 1].
    """
    result: Array = np.cumsum([0, *islice(sizes(most), count)], dtype=np.int64)
    return result
