"""Which queues are empty, as far as this scheduler knows: a whole fleet need not ask for itself."""

import asyncio
import time
from dataclasses import dataclass

from reltrace_scheduler.queue.signals import Signals
from reltrace_scheduler.queue.store import Shard

LOOK_AGAIN = 1.0
"""Seconds between looks at a queue while no signal comes."""

_AT_ONCE = 8
"""Sessions that ask one queue at a time: when it is empty, all behind them know it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where jobs for a worker come from: the queues of one route in one shard."""

    shard: Shard
    route: str

    @property
    def channel(self) -> str:
        """Signalled when jobs come."""
        return self.shard.keys.wake(self.route)


class Idleness:
    """What all sessions of a scheduler know of queues.

    A signal wakes all of them. Without this, hundreds of workers would ask Redis for what the first
    of them took, and each of them once a second for nothing.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._empty: dict[Source, tuple[tuple[int, int], float]] = {}
        self._turns: dict[Source, asyncio.Semaphore] = {}

    def turn(self, source: Source) -> asyncio.Semaphore:
        """Return what is held while a source is asked."""
        return self._turns.setdefault(source, asyncio.Semaphore(_AT_ONCE))

    def count(self, source: Source) -> tuple[int, int]:
        """Return what `note_empty` takes, before a source is asked."""
        return self._signals.count(source.channel)

    def note_empty(self, source: Source, count: tuple[int, int]) -> None:
        """Note that a source was asked, and had nothing."""
        self._empty[source] = (count, time.monotonic())

    def is_empty(self, source: Source) -> bool:
        """Tell whether a source had nothing a moment ago, and there was no signal since."""
        found = self._empty.get(source)
        if found is None:
            return False
        count, at = found
        return count == self.count(source) and time.monotonic() - at < LOOK_AGAIN
