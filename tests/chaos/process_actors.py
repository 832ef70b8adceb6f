"""What happens to processes: a link is cut, a clock jumps, a pass never ends."""

from __future__ import annotations

import random
import time

from chaos.actors import Actor
from waiting import wait_until


class CutLink(Actor):
    """What a worker or a client sends, and what is sent to it, arrives later or never."""

    name = "cut link"

    def strike(self, source: random.Random) -> bool:
        link = self.cluster.links[source.choice(sorted(self.cluster.links))]
        before = link.held
        with link.cut():
            time.sleep(source.uniform(0.5, 4))
            held = link.held - before
        self.figures["bytes held up"] += held
        return held > 0


class ClockJump(Actor):
    """The clock of a scheduler is ten minutes ahead or behind, and jumps back."""

    name = "clock that jumps"

    def strike(self, source: random.Random) -> bool:
        clock = self.cluster.clocks[source.choice(sorted(self.cluster.clocks))]
        clock.ahead = source.choice([-600.0, 600.0])
        try:
            wait_until(lambda: clock.read == clock.ahead, "a scheduler asks for the time")
            time.sleep(source.uniform(1, 5))
        finally:
            clock.ahead = 0.0
        wait_until(lambda: clock.read == 0.0, "a scheduler asks for the time")
        return True
