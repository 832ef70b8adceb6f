"""How much Redis holds after the first jobs and after the last ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import files

import redis
from chaos.cluster import Cluster
from chaos.standin import Work
from chaos.submitting import submit
from reltrace_proto.v1 import types_pb2
from reltrace_scheduler import queue as store
from reltrace_scheduler.auth.identity import DEFAULT_TENANT
from reltrace_scheduler.keys import Keys
from waiting import wait_until

BATCH = 100

MARGIN = 1 << 10
"""Bytes of all keys together: numbers in them get longer. A job left behind takes about 400."""

SCRIPTS = len([file for file in (files(store) / "lua").iterdir() if file.name != "common.lua"])
"""Scripts that there are: one that is made anew for each call would be kept by Redis for good."""


@dataclass(frozen=True, slots=True)
class Held:
    """What Redis holds, by its own account.

    `process` is what it has allocated in all. Buffers of connections come and go there by 32 KiB
    each, which says nothing about jobs: it is shown, and not judged.
    """

    keys: int
    bytes: int
    scripts: int
    process: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What Redis held before and after."""

    jobs: int
    seconds: float
    before: Held
    after: Held

    @property
    def growth(self) -> int:
        """Bytes of all keys."""
        return self.after.bytes - self.before.bytes

    @property
    def flat(self) -> bool:
        return (
            self.after.keys == self.before.keys
            and self.after.scripts <= SCRIPTS
            and self.growth < MARGIN
        )


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
    with cluster.client() as client, cluster.store() as connection:
        rounds(0, warm)
        before = _held(connection)
        began = time.monotonic()
        rounds(warm, warm + jobs // BATCH)
        seconds = time.monotonic() - began
        after = _held(connection)
    return Figures(jobs=jobs, seconds=round(seconds, 1), before=before, after=after)


def _held(connection: redis.Redis) -> Held:
    keys = Keys()
    for key in connection.scan_iter(keys("idempotency", DEFAULT_TENANT, "*").replace("{", "[{]")):
        connection.delete(key)
    # Streams that were open when leases were looked after are noted there for five minutes.
    connection.delete(keys("readers"))
    # An empty queue goes when leases are looked after next; then nothing moves any more.
    wait_until(lambda: not connection.scard(keys("queues")), "empty queues are deleted")
    held = [connection.memory_usage(key, samples=0) for key in connection.scan_iter()]
    memory = connection.info("memory")
    return Held(
        keys=len(held),
        # A key that expired since the scan holds nothing.
        bytes=sum(size or 0 for size in held),
        scripts=memory["number_of_cached_scripts"],
        process=memory["used_memory"],
    )
