"""Far more results than Redis has memory for: leases pause, and everything arrives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import redis
from chaos import standin
from chaos.cluster import Cluster
from chaos.standin import Work
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2
from reltrace_scheduler.keys import Keys
from waiting import wait_until

Start = Callable[..., Cluster]

MEMORY = 64 << 20
SIZE = 1 << 19
"""Of a result: what the stand-in's model makes of four tokens in full."""

READERS, JOBS = 4, 250
FREED = 8
"""Results that a reader takes before it frees them."""


@contextmanager
def watched(store: redis.Redis) -> Iterator[list[int]]:
    """Watch the memory of Redis all the time; gives a list that ends with the most it was."""
    peaks, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peaks.append(max(peaks[-1], store.info("memory")["used_memory"]))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peaks
    finally:
        over.set()
        watching.join()


def submit(client: trace_pb2_grpc.TraceServiceStub, works: list[Work]) -> str:
    specs = [work.spec for work in works]
    for spec in specs:
        spec.reduction = "full"
    return client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=specs), timeout=30).submission_id


def read(client: trace_pb2_grpc.TraceServiceStub, submission: str) -> set[int]:
    """Read a submission, and free its results little by little; return the numbers of its work."""
    found: set[int] = set()
    request = trace_pb2.StreamResultsRequest(submission_id=submission)
    digests: list[str] = []
    for message in client.StreamResults(request, timeout=300):
        for event in message.events:
            chunk = event.chunk
            if chunk.HasField("header"):
                work = Work.of(types_pb2.JobSpec(input_ids={"ids": chunk.header.token_ids}))
                digests = []
            digests.append(standin.digest(chunk))
            if chunk.HasField("end"):
                assert chunk.end.state == types_pb2.JOB_STATE_SUCCEEDED, chunk.end
                assert digests == standin.expected(work)
                found.add(work.number)
                if event.entry % FREED == 0 or event.entry == JOBS:
                    client.AcknowledgeResults(
                        trace_pb2.AcknowledgeResultsRequest(
                            submission_id=submission, through_entry=event.entry
                        ),
                        timeout=30,
                    )
    return found


@pytest.mark.slow
def test_a_thousand_large_results_leave_redis_within_its_memory(start: Start) -> None:
    """
    Given 1,000 jobs with results of half a megabyte each, eight times what Redis has, that at first
    nobody reads
    I expect leases to pause with Redis within its memory, and once they are read every result to
    arrive; and no write to be refused for want of memory, nor a worker or scheduler to end.
    """
    cluster = start(schedulers=2, workers=2, fsync="no", lease=5.0)
    with cluster.client() as client, cluster.store() as store, cluster.store() as watching:
        store.config_set("maxmemory", MEMORY)
        wait_until(
            lambda: all(
                f"maxmemory={MEMORY}" in part.log.read_text() for part in cluster.schedulers
            ),
            "schedulers find out how much memory there is",
        )
        with watched(watching) as peaks:
            first = range(0, READERS * JOBS, JOBS)
            submissions = [
                submit(client, [Work(number, SIZE) for number in range(begin, begin + JOBS)])
                for begin in first
            ]
            load = Keys()("load")
            wait_until(
                lambda: (
                    int(store.hget(load, "results") or 0) > MEMORY / 8
                    and not int(store.hget(load, "reserved") or 0)
                ),
                "leases pause",
            )
            paused = int(store.hget(load, "jobs"))
            assert paused > READERS * JOBS / 2
            with ThreadPoolExecutor(READERS) as readers:
                found = list(readers.map(lambda one: read(client, one), submissions))
        assert set().union(*found) == set(range(READERS * JOBS))
        assert MEMORY / 8 < peaks[-1] < MEMORY
        assert "errorstat_OOM" not in store.info("errorstats")
        assert not any(map(int, store.hmget(load, "jobs", "bytes", "results", "reserved")))
    assert cluster.deaths == []
