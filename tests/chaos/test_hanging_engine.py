"""The real worker, with a model, and an engine that hangs."""

import re
from collections.abc import Callable

import pytest
from chaos.cluster import Cluster
from reltrace_proto.v1 import trace_pb2, types_pb2
from reltrace_worker.session.lifecycle import HANGS
from waiting import wait_until

Start = Callable[..., Cluster]

PROMPT = "a secret of the prompt"


@pytest.mark.slow
def test_another_worker_has_the_jobs_of_a_pass_that_hangs(start: Start) -> None:
    """
    Given a worker whose pass hangs while its heartbeats go on, and a job that waits behind it
    If it has stood still for longer than a first pass may, and is started again
    I expect it to have left with a code of its own, its log to tell the job and the stack but no
    prompt, one lease to be lost, that of the hung pass, and both results by the next attempt.
    """
    cluster = start(workers=0, schedulers=1, lease=2.0)
    (scheduler,) = cluster.schedulers
    hanging = cluster.start_module(
        "hanging", "chaos.hanging_worker", str(cluster.folder / "hung"),
        "--scheduler", cluster.address, "--model", "demo", "--threads", "1",
    )  # fmt: skip
    wait_until(lambda: cluster.connected() == 1, "the worker connects", 100)
    with cluster.client() as client:
        jobs = [
            types_pb2.JobSpec(prompt=PROMPT),
            # Another rule is another pass.
            types_pb2.JobSpec(prompt=PROMPT, rule="cp_lrp"),
        ]
        submitted = client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=jobs), timeout=10)
        wait_until(lambda: "hangs with 1 jobs" in hanging.log.read_text(), "the pass hangs")
        wait_until(lambda: len(hanging.deaths) == 1, "the worker leaves", 40)
        ends = {
            event.chunk.job_id: event.chunk.end
            for message in client.StreamResults(
                trace_pb2.StreamResultsRequest(submission_id=submitted.submission_id), timeout=100
            )
            for event in message.events
        }
    assert [ends[job].state for job in submitted.job_ids] == [types_pb2.JOB_STATE_SUCCEEDED] * 2
    assert [ends[job].attempt for job in submitted.job_ids] == [2, 2]
    lost = re.findall(r"leases.lost +.*jobs=(\d+)", scheduler.log.read_text())
    assert lost == ["1"]
    log = hanging.log.read_text()
    assert [death.code for death in hanging.deaths] == [HANGS]
    assert "worker.hangs" in log
    assert f"{submitted.job_ids[0]} attempt=1 tenant=default" in log
    assert "in _blocked_kernel" in log
    assert PROMPT not in log
