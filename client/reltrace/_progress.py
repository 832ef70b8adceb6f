"""The bar of `trace_many(progress=True)`, in a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Self

from reltrace._trace import Failure


class Progress:
    """Counts results on a tqdm bar.

    Parameters
    ----------
    items : object
        What is worked through; its length, where it has one, is the bar's end.
    shown : bool
        Whether there is a bar at all.
    """

    def __init__(self, items: object, *, shown: bool) -> None:
        self._total = len(items) if isinstance(items, Sized) else None
        self._shown = shown
        self._failures = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._total, unit="trace", smoothing=0.1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def count(self, result: object) -> None:
        """Note one result."""
        if self._bar is None:
            return
        if isinstance(result, Failure):
            self._failures += 1
            self._bar.set_postfix(failed=self._failures, refresh=False)
        self._bar.update()
