"""The bar of `progress=True`, in a terminal or a notebook."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from typing import Any, Self

from reltrace._failure import Failure


class Progress:
    """Counts results on a tqdm bar, with their rate, and how many failed.

    Parameters
    ----------
    items : object
        What is worked through; its length, where it has one, is the bar's end.
    shown : bool
        Whether there is a bar at all.
    unit : str
        What is counted.
    """

    def __init__(self, items: object, *, shown: bool, unit: str = "trace") -> None:
        self._unit = unit
        self._total = len(items) if isinstance(items, Sized) else None
        self._shown = shown
        self._failures = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._shown:
            self._bar = _tqdm()(total=self._total, unit=self._unit, smoothing=0.1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """Note some that are done."""
        if self._bar is not None:
            self._bar.update(count)

    def count(self, result: object) -> None:
        """Note one result."""
        if self._bar is None:
            return
        if isinstance(result, Failure):
            self._failures += 1
            self._bar.set_postfix(failed=self._failures, refresh=False)
        self._bar.update()


def _tqdm() -> Any:
    """Return the bar for where we are: a widget in a notebook that has widgets, else text."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # A notebook without ipywidgets gets the bar as text, which is all there is to say.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm
