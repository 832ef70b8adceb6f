"""Kills at random, by seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chaos.part import Part

_PROGRESS = 60.0
"""Seconds within which something has to be delivered after a kill."""

_LONGEST_PAUSE = 0.8
_TWO_AT_ONCE = 0.15


class Killer:
    """SIGKILL to one part after another, sometimes two at once.

    Parameters
    ----------
    victims
        Parts by kind, as they are at the moment.
    weights
        How often each kind is hit, against the others.
    progress
        A number that grows as results are delivered: the next kill waits until it did, so that a
        run is work with kills in it and not kills alone. When exactly is drawn.
    seed
        Of the draws.
    """

    def __init__(
        self,
        victims: Callable[[], Mapping[str, Sequence[Part]]],
        weights: Mapping[str, float],
        progress: Callable[[], int],
        seed: int,
    ) -> None:
        self.kills: Counter[str] = Counter()
        self._log: list[tuple[float, str, str]] = []
        self.longest_stall = 0.0
        self._victims = victims
        self._weights = weights
        self._progress = progress
        self._random = random.Random(seed)

    def run(self, kills: int) -> None:
        """Kill so often.

        Raises
        ------
        AssertionError
            Nothing was delivered for a minute.
        """
        never = threading.Event()
        while self.kills.total() < kills:
            before, since = self._progress(), time.monotonic()
            while self._progress() == before:
                stall = time.monotonic() - since
                assert stall < _PROGRESS, f"nothing delivered after {dict(self.kills)} kills"
                never.wait(0.01)
            self.longest_stall = max(self.longest_stall, time.monotonic() - since)
            # Not a wait for anything: the moment of the kill is drawn.
            never.wait(self._random.uniform(0, _LONGEST_PAUSE))
            for _ in range(2 if self._random.random() < _TWO_AT_ONCE else 1):
                self.kill()

    def write_log(self, path: Path) -> None:
        """Write when what was killed, to be read beside the logs of the parts."""
        path.write_text("".join(f"{at:.3f} {name}\n" for at, _, name in self._log))

    def times(self, kind: str) -> list[float]:
        """Return when parts of a kind were killed."""
        return [at for at, killed, _ in self._log if killed == kind]

    def kill(self) -> None:
        """Kill one part, drawn."""
        kinds = list(self._weights)
        (kind,) = self._random.choices(kinds, [self._weights[kind] for kind in kinds])
        victim = self._random.choice(self._victims()[kind])
        if (pid := victim.kill()) is not None:
            self.kills[kind] += 1
            self._log.append((time.time(), kind, f"{victim.name}.{pid}"))
