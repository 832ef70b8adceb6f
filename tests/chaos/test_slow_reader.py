"""Who does not read slows nobody but himself."""

import statistics
import time
from collections.abc import Callable
from itertools import count

import psutil
from chaos.cluster import Cluster
from chaos.standin import Work
from chaos.submitting import submit
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2
from waiting import wait_until

Start = Callable[..., Cluster]

LARGE = [Work(number, size=1 << 20) for number in range(40)]
"""40 MiB of results: many times what connections buffer, less than the bound on unread ones."""

ROUNDS = 25


def round_trip(client: trace_pb2_grpc.TraceServiceStub, numbers: "count[int]") -> float:
    """Send small batches through, one at a time; return the median of their seconds."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        submitted = submit(client, [Work(next(numbers)) for _ in range(20)])
        assert {end.state for end in submitted.ends()} == {types_pb2.JOB_STATE_SUCCEEDED}
        submitted.acknowledge()
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def test_a_reader_that_does_not_read_slows_nobody_else(start: Start) -> None:
    """
    Given a client that asks for its large results and does not read them
    If another one works meanwhile
    I expect the other to be as fast as before and after, but for the noise of busy cores, the
    scheduler not to hold the results in memory, and the first one to get all of them when it reads
    at last.
    """
    cluster = start(schedulers=1, workers=1)
    numbers = count(1000)
    with cluster.client() as slow, cluster.client() as other:
        round_trip(other, numbers)  # warm
        alone = round_trip(other, numbers)
        large = submit(slow, LARGE)
        wait_until(lambda: set(large.states()) == {"SUCCEEDED"}, "the large results are there")
        scheduler = psutil.Process(cluster.schedulers[0].pid)
        before = scheduler.memory_info().rss
        stream = slow.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=large.id), timeout=100
        )
        first = next(stream)  # it has begun, and stands still from here on
        beside = round_trip(other, numbers)
        grown = scheduler.memory_info().rss - before
        assert grown < 20 << 20
        received = sum(
            len(piece.data)
            for message in (first, *stream)
            for event in message.events
            for piece in event.chunk.tensors
        )
        assert received == sum(work.size for work in LARGE)
        assert beside < 3 * max(alone, round_trip(other, numbers))
