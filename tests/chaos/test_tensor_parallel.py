"""The real worker in two processes, one of which dies while jobs are computed."""

import os
import signal
from collections.abc import Callable

import pytest
from chaos.cluster import Cluster
from reference.processes import children
from reltrace_proto.v1 import trace_pb2, types_pb2
from reltrace_worker.session.lifecycle import HANGS
from waiting import wait_until

Start = Callable[..., Cluster]


@pytest.mark.slow
def test_a_rank_that_dies_between_results_costs_no_job(start: Start) -> None:
    """
    Given a worker in two processes, and more jobs than go into one pass
    If its second process is killed when the first results are there
    I expect it to end with the code by which it is started again, and every job to succeed.
    """
    cluster = start(workers=0, schedulers=1, lease=2.0)
    worker = cluster.start_module(
        "divided", "reltrace_worker", "--scheduler", cluster.address, "--model", "demo",
        "--threads", "1", "--tensor-parallel", "2", "--max-tokens", "64",
    )  # fmt: skip
    wait_until(lambda: cluster.connected() == 1, "the worker connects", 100)
    (follower,) = children(worker.pid)
    killed = False
    states = []
    with cluster.client() as client:
        jobs = [types_pb2.JobSpec(prompt=f"the cat counts to {n}") for n in range(200)]
        submitted = client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=jobs), timeout=10)
        request = trace_pb2.StreamResultsRequest(submission_id=submitted.submission_id)
        for message in client.StreamResults(request, timeout=100):
            states += [e.chunk.end.state for e in message.events if e.chunk.HasField("end")]
            if states and not killed:
                os.kill(follower, signal.SIGKILL)
                killed = True
    assert states == [types_pb2.JOB_STATE_SUCCEEDED] * len(jobs)
    wait_until(lambda: len(worker.deaths) == 1, "it is started again")
    assert [death.code for death in worker.deaths] == [HANGS]
    assert "rank 1 has ended" in worker.log.read_text()
