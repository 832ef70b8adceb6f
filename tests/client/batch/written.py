"""What batches wrote, and whether it is what they were to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import reltrace
from fake_results import relevance_of
from reltrace.batch.run import Summary

Batch = Callable[..., Summary]

LINES = [f"prompt {number} {'x ' * (number % 3)}" for number in range(40)]


def check(folder: Path, lines: list[str], *, without: set[int] = frozenset()) -> None:
    """Check that every line has its trace once, in order, and with its own numbers."""
    loaded = reltrace.load_batch(folder)
    wanted = [index for index in range(len(lines)) if index not in without]
    assert [trace.id for trace in loaded] == wanted
    for trace in loaded:
        text = " ".join(["<s>", *lines[trace.id].split()])
        expected = relevance_of(text, "resid", trace.relevance.shape)
        np.testing.assert_array_equal(trace.relevance, expected)
    assert {failed.index for failed in loaded.errors} == without


def content(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (trace.id, trace.relevance.tobytes(), trace.tokens, trace.target)
        for trace in reltrace.load_batch(folder)
    ]
