"""A tenant that floods, and how long others wait meanwhile."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from contextlib import suppress
from itertools import count

import grpc
import redis
from chaos import raw_client
from chaos.actors import Actor
from chaos.checks import Tally
from chaos.cluster import FLOOD_JOBS, Cluster
from chaos.standin import Work
from chaos.submitting import Submitted, submit
from reltrace_proto.v1 import types_pb2
from reltrace_scheduler.keys import Keys
from waiting import wait_until

STATE = "JOB_STATE_"

_FIRST = 1_000_000_000
_RUN = re.compile(rb"^runs 1\d{9}$", re.MULTILINE)
"""What a worker says when it runs a job of a flood, by its number."""


class Flood(Actor):
    """A tenant submits as fast as it can; others are served nevertheless."""

    name = "tenant that floods"

    MOST_BEFORE = FLOOD_JOBS // 5
    """Jobs of the flood that may run while one of another tenant waits.

    First come, first served would be all of them. Seconds say nothing here: kills cost some.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.longest_wait = 0.0
        self.most_before = 0
        self._numbers = count(2_000_000_000)
        self._first = _FIRST
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
        logs = [(worker.log, worker.log.stat().st_size) for worker in self.cluster.workers]
        with self.cluster.client() as client:
            read: list[Submitted] = []

            def served() -> bool:
                try:
                    if not read:
                        one = submit(client, [Work(number)], f"other-{number}")
                        (end,) = one.ends(raw_client.PATIENCE)
                        read.append(one)
                        self._ends[types_pb2.JobState.Name(end.state).removeprefix(STATE)] += 1
                    # Not to be submitted again after that: what is freed is forgotten.
                    read[0].acknowledge()
                except grpc.RpcError:
                    return False
                return True

            wait_until(served, "a job of another tenant ends")
        waited = time.monotonic() - began
        self.longest_wait = max(self.longest_wait, waited)
        self.figures["jobs of others"] += 1
        before = sum(len(_RUN.findall(log.read_bytes()[size:])) for log, size in logs)
        self.most_before = max(self.most_before, before)
        if before > self.MOST_BEFORE:
            self._faults.append(f"{before} jobs of a flood ran before one of another tenant")
