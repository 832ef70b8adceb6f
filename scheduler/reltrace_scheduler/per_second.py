"""A limit per second inside this process."""

import time


class PerSecond:
    """Allows so many per second; the number of one second may come at once."""

    def __init__(self, number: float) -> None:
        self._rate = self._left = number
        self._at = time.monotonic()

    def take(self, wanted: int) -> int:
        """Return how many of those wanted are allowed now."""
        now = time.monotonic()
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        taken = min(wanted, int(self._left))
        self._left -= taken
        return taken
