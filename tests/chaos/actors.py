"""What happens to a service beside kills: each strikes now and then, and proves that it struck."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Self

import grpc
import redis
from chaos import raw_client
from chaos.checks import Tally
from chaos.cluster import FLOOD_JOBS, Cluster
from chaos.redis_node import RedisNode
from chaos.standin import Work
from chaos.submitting import submit
from reltrace_proto.v1 import types_pb2
from reltrace_scheduler.keys import Keys
from waiting import wait_until

_TRIES = 20
"""Strikes in vain after which an actor can not do what it should: a kill may come between."""

_LONGEST_REST = 1.0
"""Seconds between strikes."""

LATE = 1.0
"""Seconds after which a client has noted what it was answered."""


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


class FullRedis(Actor):
    """Redis has less memory than it uses: it takes nothing more."""

    name = "full Redis"

    def strike(self, source: random.Random) -> bool:
        with suppress(redis.RedisError), self.cluster.store() as store:
            bound = store.config_get("maxmemory")["maxmemory"]
            before = _refusals(store)
            store.config_set("maxmemory", store.info("memory")["used_memory"] // 2)
            try:
                # It is refused something, however long that takes; then it stays so for a while.
                wait_until(lambda: _refusals(store) > before, "a full Redis refuses a write", 20)
                time.sleep(source.uniform(0.5, 3))
                refused = _refusals(store) - before
            finally:
                store.config_set("maxmemory", bound)
            # One that was killed meanwhile counts anew, and is not full any more.
            self.figures["writes refused"] += max(refused, 0)
            return refused > 0
        return False


def _refusals(store: redis.Redis) -> int:
    errors = store.info("errorstats")
    return int(errors.get("errorstat_OOM", {}).get("count", 0))


class PausedRedis(Actor):
    """Redis is there and does not answer, the first time for longer than a lease."""

    name = "paused Redis"

    def strike(self, source: random.Random) -> bool:
        first = not self.figures["longer than a lease"]
        seconds = 2.5 * self.cluster.lease if first else source.uniform(0.5, 3)
        node = self.cluster.redis_nodes[0]
        with node.part.paused():
            time.sleep(seconds)
            try:
                with node.store(seconds=0.1) as store:
                    store.ping()
            except redis.TimeoutError:
                self.figures["longer than a lease"] += seconds > self.cluster.lease
                return True
            except redis.ConnectionError:
                # It was killed.
                return False
        return False


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
        pid, order = worker.pid, self.cluster.folder / f"{worker.name}.hang"
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


class Flood(Actor):
    """A tenant submits as fast as it can; others are served nevertheless."""

    name = "tenant that floods"

    LONGEST_WAIT = 8.0
    """Seconds that a job of another tenant may wait meanwhile, kills and lost leases included.

    Half of what it would wait behind all jobs of the flood (`FLOOD_JOBS`).
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.longest_wait = 0.0
        self._numbers = count(2_000_000_000)
        self._first = 1_000_000_000
        self._ends: Counter[str] = Counter()
        self._faults: list[str] = []
        self._names = count()

    def strike(self, source: random.Random) -> bool:
        seconds = source.uniform(3, 6)
        name = f"flood{next(self._names)}"
        part = self.cluster.start_module(
            name, "chaos.flood", *self.cluster.connection_of(name, "flood"),
            "--first", str(self._first), "--seconds", str(seconds),
        )  # fmt: skip
        self._first += 1_000_000
        wait_until(lambda: self._queued() > FLOOD_JOBS / 2 or part.ended, "a flood comes")
        deep = False
        end = time.monotonic() + seconds
        while time.monotonic() < end and not part.ended:
            deep = deep or self._queued() > FLOOD_JOBS / 2
            self._wait_for_one()
        part.finish(raw_client.PATIENCE)
        del self.cluster.links[name]
        self._faults += [f"{name}: {death.last_words}" for death in part.deaths]
        counts = json.loads(part.last_words().rpartition(" | ")[2])
        self._faults += [f"{name}: {counts}"] if counts.get("faults") else []
        self._ends["SUCCEEDED"] += counts.get("SUCCEEDED", 0)
        self._ends["CANCELLED"] += counts.get("CANCELLED", 0)
        self.figures["accepted"] += counts["accepted"]
        self.figures["submissions refused"] += counts.get("refused", 0)
        return deep

    def settle(self, tally: Tally) -> None:
        tally.others += self._ends
        tally.faults += self._faults

    def _queued(self) -> int:
        """Count the jobs of the flood that have not ended."""
        with suppress(redis.RedisError), self.cluster.store() as store:
            return int(store.hget(Keys()("tenant", "flood"), "jobs") or 0)
        return 0

    def _wait_for_one(self) -> None:
        """Submit a job as another tenant, and see how long it takes."""
        number, began = next(self._numbers), time.monotonic()
        with self.cluster.client() as client:

            def served() -> bool:
                try:
                    one = submit(client, [Work(number)], f"other-{number}")
                    (end,) = one.ends(raw_client.PATIENCE)
                    one.acknowledge()
                except grpc.RpcError:
                    return False
                self._ends[types_pb2.JobState.Name(end.state).removeprefix("JOB_STATE_")] += 1
                return True

            wait_until(served, "a job of another tenant ends")
        waited = time.monotonic() - began
        self.longest_wait = max(self.longest_wait, waited)
        self.figures["jobs of others"] += 1
        if waited > self.LONGEST_WAIT:
            self._faults.append(f"{self.name}: a job of another tenant waited {waited:.1f} s")


class Promotion(Actor):
    """A replica becomes the primary; what it had not been sent yet is lost.

    In turn the former primary is killed, or lives on and is told to follow. Its replica
    stands still before, for which Redis accepts what will be lost.
    """

    name = "promoted replica"

    def strike(self, source: random.Random) -> bool:
        old, new = self.cluster.redis_nodes
        wait_until(lambda: _in_step(new), "the replica has what its primary has")
        began = time.time()
        with new.part.paused():
            time.sleep(source.uniform(0.2, 1.5))
            before = _role(old)
            if dies := source.random() < 0.5:
                old.follow(new)
                old.part.stop(number=signal.SIGKILL)
        new.follow(None)
        with new.store() as store:
            store.replicaof("NO", "ONE")
        self.cluster.redis_nodes.reverse()
        self.cluster.point_to_primary()
        if dies:
            old.part.again()
        else:
            old.follow(new)
            with suppress(redis.RedisError), old.store() as store:
                store.replicaof(*new.address)
        self.losses.append((began, time.time() + LATE))
        return before == "master"


def _role(node: RedisNode) -> str:
    with suppress(redis.RedisError), node.store() as store:
        return str(store.info("replication")["role"])
    return ""


def _in_step(replica: RedisNode) -> bool:
    with suppress(redis.RedisError), replica.store() as store:
        state = store.info("replication")
        return state["role"] == "slave" and state["master_link_status"] == "up"
    return False


class Actors:
    """Lets one actor after another strike, until the block ends and each has struck.

    Parameters
    ----------
    actors
        In an order that is drawn.
    seed
        Of what is drawn.
    """

    def __init__(self, actors: Sequence[Actor], seed: int) -> None:
        self._actors = list(actors)
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
            if actor.strike(self._random):
                actor.figures["strikes"] += 1
                return
            actor.figures["in vain"] += 1
        raise AssertionError(f"{actor.name}: {_TRIES} times in vain")


ACTORS = {
    actor.name.replace(" ", "-"): actor
    for actor in (FullRedis, PausedRedis, Promotion, CutLink, ClockJump, Flood)
}
"""By the names that a command line takes."""
