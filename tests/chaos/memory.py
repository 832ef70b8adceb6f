"""How much Redis holds after the first jobs and after the last ones."""

from __future__ import annotations

import time
from dataclasses import dataclass

import redis
from chaos.cluster import Cluster
from chaos.standin import Work
from chaos.submitting import submit
from reltrace_proto.v1 import types_pb2
from reltrace_scheduler.auth.identity import DEFAULT_TENANT
from reltrace_scheduler.store.keys import Keys
from waiting import wait_until

BATCH = 100

MARGIN = 128 << 10
"""Bytes: the allocator's and the buffers' noise. One job that stays behind takes about 400."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What Redis held, in keys and in bytes by its own account."""

    jobs: int
    seconds: float
    keys_before: int
    keys_after: int
    bytes_before: int
    bytes_after: int
    growth: int
    margin: int = MARGIN

    @property
    def flat(self) -> bool:
        return self.keys_after == self.keys_before and self.growth < self.margin


def measure(cluster: Cluster, jobs: int) -> Figures:
    """Send jobs through, a batch at a time; compare the store after a few batches and at the end.

    Submissions have keys, as the SDK's have; those are remembered for a day by design and are
    counted out, here by deleting them.
    """

    def rounds(first: int, last: int) -> None:
        for number in range(first, last):
            numbers = range(number * BATCH, (number + 1) * BATCH)
            submitted = submit(client, [Work(n) for n in numbers], f"memory-{number}")
            assert {end.state for end in submitted.ends()} == {types_pb2.JOB_STATE_SUCCEEDED}
            submitted.acknowledge()

    warm = 5
    with cluster.client() as client, cluster.store() as store:
        rounds(0, warm)
        before = _held(store)
        began = time.monotonic()
        rounds(warm, warm + jobs // BATCH)
        seconds = time.monotonic() - began
        after = _held(store)
    return Figures(
        jobs=jobs,
        seconds=round(seconds, 1),
        keys_before=before[0],
        keys_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        growth=after[1] - before[1],
    )


def _held(store: redis.Redis) -> tuple[int, int]:
    keys = Keys()
    for key in store.scan_iter(keys.idempotency(DEFAULT_TENANT, "*").replace("{", "[{]")):
        store.delete(key)
    # An empty queue goes when leases are looked after next; then nothing moves any more.
    wait_until(lambda: not store.scard(keys.queues), "empty queues are deleted")
    return store.dbsize(), store.info("memory")["used_memory"]
