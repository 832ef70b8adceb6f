"""What happens to Redis: it is full, it does not answer, its replica takes over."""

from __future__ import annotations

import random
import signal
import time
from contextlib import suppress

import redis
from chaos.actors import Actor
from chaos.cluster import REDIS_BYTES
from chaos.redis_node import RedisNode
from waiting import wait_until

_FILLER = "chaos:filler"

LATE = 1.0
"""Seconds after which a client has noted what it was answered."""


class FullRedis(Actor):
    """Somebody else fills the memory of Redis: it takes nothing more."""

    name = "full Redis"

    def strike(self, source: random.Random) -> bool:
        refused = 0
        try:
            with suppress(redis.RedisError), self.cluster.store() as store:
                before = _refusals(store)
                store.setrange(_FILLER, REDIS_BYTES, "x")
                # Where all jobs wait to be accepted, nobody writes.
                with suppress(AssertionError):
                    wait_until(lambda: _refusals(store) > before, "a full Redis refuses a write", 5)
                time.sleep(source.uniform(0.5, 3))
                # One that was killed meanwhile counts anew.
                refused = max(_refusals(store) - before, 0)
        finally:
            wait_until(self._empty, "Redis has room again")
        self.figures["writes refused"] += refused
        return refused > 0

    def _empty(self) -> bool:
        with suppress(redis.RedisError), self.cluster.store() as store:
            store.unlink(_FILLER)
            return True
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
            time.sleep(source.uniform(0.5, 2.5))
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
