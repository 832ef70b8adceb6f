"""What happens to a service beside kills: each strikes now and then, and proves that it struck."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

from chaos.checks import Tally
from chaos.cluster import Cluster
from waiting import wait_until

_TRIES = 20
"""Strikes in vain after which an actor can not do what it should: a kill may come between."""

_LONGEST_REST = 1.0
"""Seconds between strikes."""


class Actor:
    """Something that happens to a service.

    Parameters
    ----------
    cluster
        To which it happens.
    """

    name: str

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.figures: Counter[str] = Counter()
        self.losses: list[tuple[float, float]] = []
        """When Redis may have lost what it had answered, because of this."""

    def strike(self, source: random.Random) -> bool:
        """Let it happen once, and end; return whether it is proved that it did."""
        raise NotImplementedError

    def settle(self, tally: Tally) -> None:
        """Add what it did to the jobs that have ended."""


class Actors:
    """Lets one actor after another strike, until the block ends and each has struck.

    Parameters
    ----------
    actors
        In an order that is drawn.
    progress
        A number that grows as results are delivered: after each strike the next one waits for it.
    seed
        Of what is drawn.
    """

    def __init__(self, actors: Sequence[Actor], progress: Callable[[], int], seed: int) -> None:
        self._actors = list(actors)
        self._progress = progress
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._abandoned = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="actors")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._abandoned = kind is not None
        self._over.set()
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.is_set() or any(not a.figures["strikes"] for a in self._actors):
                for actor in self._random.sample(self._actors, len(self._actors)):
                    if self._abandoned:
                        return
                    if not self._over.is_set() or not actor.figures["strikes"]:
                        self._strike(actor)
                        self._over.wait(self._random.uniform(0, _LONGEST_REST))
        except Exception as error:
            self._failure = error

    def _strike(self, actor: Actor) -> None:
        for _ in range(_TRIES):
            struck = actor.strike(self._random)
            self._wait_for_progress(f"results go on after a {actor.name}")
            if struck:
                actor.figures["strikes"] += 1
                return
            actor.figures["in vain"] += 1
        raise AssertionError(f"{actor.name}: {_TRIES} times in vain")

    def _wait_for_progress(self, what: str) -> None:
        before = self._progress()
        wait_until(lambda: self._progress() > before, what)
