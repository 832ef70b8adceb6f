"""The bar of `progress=True` and of `reltrace batch`, in a terminal, a notebook or a log."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sized
from typing import Any, Self

from reltrace.types.failure import Failure

_WINDOW = 60.0
_BURST = 0.5
_EVIDENCE = 2.0
"""Seconds. A pass of the model gives many results at once: what comes within `_BURST` counts as one
moment, and a rate is told once two moments lie `_EVIDENCE` apart."""


class Rate:
    """How many results come per second, of late.

    Parameters
    ----------
    clock : callable
        Seconds that rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0
        # Moments at which results came, with how many there were after each.
        self._moments: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Note results that come now."""
        now = self._clock()
        self._count += count
        if self._moments and now - self._moments[-1][0] < _BURST:
            self._moments[-1] = (self._moments[-1][0], self._count)
            return
        self._moments.append((now, self._count))
        while len(self._moments) > 2 and now - self._moments[1][0] >= _WINDOW:
            self._moments.popleft()

    def per_second(self) -> float | None:
        """Return the rate of the last minute, or between the last two moments; None: not known.

        What came first is not counted: the time before it has been that of other jobs, or of a
        worker that starts.
        """
        if not self._moments:
            return None
        (first, before), (last, after) = self._moments[0], self._moments[-1]
        return (after - before) / (last - first) if last - first >= _EVIDENCE else None


class Progress:
    """Counts results on a tqdm bar, with their rate, and how many failed; from any thread.

    Parameters
    ----------
    items : object
        What is worked through; its length, where it has one, is the bar's end.
    shown : bool
        Whether there is a bar at all.
    unit : str
        What is counted.
    total : int or None
        The bar's end, instead of the length of `items`.
    interval : float
        Seconds between two pictures of the bar, at least.
    """

    def __init__(
        self,
        items: object,
        *,
        shown: bool,
        unit: str = "trace",
        total: int | None = None,
        interval: float = 0.1,
    ) -> None:
        self._unit = unit
        self._total = len(items) if isinstance(items, Sized) else total
        self._shown = shown
        self._interval = interval
        self._failures = 0
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.begin(0)
        return self

    def begin(self, done: int) -> None:
        """Show the bar, with what is done already."""
        if self._shown:
            self._bar = _bar_class()(
                total=self._total,
                initial=done,
                unit=self._unit,
                mininterval=self._interval,
                miniters=1,
            )

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Draw the bar for the last time."""
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """Note some that are done."""
        if self._bar is not None:
            with self._lock:
                self._bar.recent.add(count)
                self._bar.update(count)

    def count(self, result: object) -> None:
        """Note one result."""
        self.result(failed=isinstance(result, Failure))

    def result(self, failed: bool) -> None:
        """Note one result, and whether it failed."""
        if failed and self._bar is not None:
            with self._lock:
                self._failures += 1
                self._bar.set_postfix(failed=self._failures, refresh=False)
        self.add(1)


def _bar_class() -> Any:
    """Return the bar for where we are: a widget in a notebook that has widgets, else text."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # A notebook without ipywidgets gets the bar as text, which is all there is to say.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        """Tells the recent rate and what it makes of the rest; "?" while it is not known.

        tqdm's own rate begins at the bar's first picture: where jobs wait, it is far too low.
        """

        def __init__(self, **options: Any) -> None:
            self.recent = Rate()
            self.over = False
            super().__init__(**options)

        @property
        def format_dict(self) -> dict[str, Any]:
            """What the bar is drawn from."""
            # The last picture has the rate of the whole run, which tqdm finds where there is none.
            rate = None if self.over else self.recent.per_second() or 0
            return {**super().format_dict, "rate": rate}

        def close(self) -> None:
            """Draw the bar for the last time."""
            self.over = True
            super().close()

    return Bar
