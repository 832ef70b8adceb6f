"""What happens to processes: a link is cut, a clock jumps, a pass never ends."""

from __future__ import annotations

import random
import time

from chaos.actors import Actor
from reltrace_worker.session.lifecycle import HANGS
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


class HungEngine(Actor):
    """A pass of a worker never ends: the worker leaves by itself."""

    name = "hung engine"

    def strike(self, source: random.Random) -> bool:
        worker = source.choice(self.cluster.workers)
        pid, order = worker.pid, self.cluster.hang_order(worker.name)
        order.touch()
        try:
            wait_until(lambda: not order.exists() or worker.pid != pid, "a pass begins")
            if order.exists():
                return False
        finally:
            order.unlink(missing_ok=True)
        wait_until(lambda: worker.pid != pid, "the worker leaves and is replaced")
        left = [death for death in worker.deaths if death.code == HANGS]
        for death in left:
            worker.deaths.remove(death)
        return bool(left)
