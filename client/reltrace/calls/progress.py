"""The progress bar of `progress=True` and `reltrace batch`, in a terminal, a notebook or a log."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sized
from typing import Any, Self

from reltrace.types.errors import Failure

# Seconds. A pass of the model gives many results at once: those that come within `_BURST` count as
# one moment, and the rate is known once two moments are `_MIN_SPAN` apart.
_WINDOW = 60.0
_BURST = 0.5
_MIN_SPAN = 2.0


class Rate:
    """Results per second over the last minute, or between the last two moments.

    The time before the first moment does not count: it was spent on other jobs, or on the start of
    a worker.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0
        # Moments at which results came, each with the count after it.
        self._moments: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        now = self._clock()
        self._count += count
        if self._moments and now - self._moments[-1][0] < _BURST:
            self._moments[-1] = (self._moments[-1][0], self._count)
            return
        self._moments.append((now, self._count))
        while len(self._moments) > 2 and now - self._moments[1][0] >= _WINDOW:
            self._moments.popleft()

    def per_second(self) -> float | None:
        """Return the rate, or None while it is not known."""
        if not self._moments:
            return None
        (first, before), (last, after) = self._moments[0], self._moments[-1]
        return (after - before) / (last - first) if last - first >= _MIN_SPAN else None


class Progress:
    """Counts results on a tqdm bar, with their rate, and how many failed; from any thread.

    The bar ends at the length of `items` if it has one, else at `total`; it is drawn at most every
    `interval` seconds.
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, done: int) -> None:
        """Show the bar, which starts at the number of results that exist already."""
        if self._shown:
            self._bar = _bar_class()(
                total=self._total,
                initial=done,
                unit=self._unit,
                mininterval=self._interval,
                miniters=1,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int, failed: int = 0) -> None:
        """Count results, of which some failed."""
        if self._bar is None:
            return
        with self._lock:
            self._failures += failed
            if failed:
                self._bar.set_postfix(failed=self._failures, refresh=False)
            self._bar.recent.add(count)
            self._bar.update(count)

    def count(self, result: object) -> None:
        """Count one result."""
        self.add(1, failed=isinstance(result, Failure))


def _bar_class() -> Any:
    """Return tqdm's class of bars for this environment, a notebook or a terminal, with `Rate`."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # Without ipywidgets, tqdm warns in a notebook that it draws the bar as text.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        """Shows the recent rate and the time left at that rate; "?" while it is not known.

        tqdm measures its own rate from when the bar is shown: if jobs wait at first, it is far too
        low.
        """

        def __init__(self, **options: Any) -> None:
            self.recent = Rate()
            self.closing = False
            super().__init__(**options)

        @property
        def format_dict(self) -> dict[str, Any]:
            # With None, tqdm shows the rate of the whole run.
            rate = None if self.closing else self.recent.per_second() or 0
            return {**super().format_dict, "rate": rate}

        def close(self) -> None:
            self.closing = True
            super().close()

    return Bar
