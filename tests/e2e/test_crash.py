"""What is accepted is finished, whoever dies."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import reltrace
from e2e.conftest import Process, address_in, wait_until
from reference.checkpoints import PLAIN, save_checkpoint
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2

Start = Callable[..., Process]

LEASE = 3.0
PROMPT_TOKENS = 2000


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose pass over a long prompt takes seconds."""
    return save_checkpoint(
        tmp_path_factory.mktemp("slow") / "slow",
        PLAIN,
        layers=16,
        hidden_size=256,
        intermediate_size=1024,
        context_length=PROMPT_TOKENS,
    )


def long_job(seed: int, tokens: int = PROMPT_TOKENS) -> types_pb2.JobSpec:
    ids = np.random.default_rng(seed).integers(10, 300, tokens)
    return types_pb2.JobSpec(input_ids=types_pb2.TokenIds(ids=ids.tolist()))


def test_a_killed_worker_costs_no_job(start: Start, tmp_path: Path, slow_model: Path) -> None:
    scheduler = start(
        "reltrace_scheduler", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "data"),
        "--lease", str(LEASE),
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    workers = {
        name: start(
            "reltrace_worker", "--scheduler", address, "--model", str(slow_model),
            "--worker-id", name, "--threads", "1",
        )
        for name in ("one", "two")
    }  # fmt: skip
    with grpc.insecure_channel(address) as channel:
        client = trace_pb2_grpc.TraceServiceStub(channel)

        def connected() -> int:
            models = client.ListModels(trace_pb2.ListModelsRequest(), timeout=10).models
            return sum(model.workers for model in models)

        def job() -> trace_pb2.JobStatus:
            request = trace_pb2.GetJobsRequest(job_ids=submission.job_ids)
            return client.GetJobs(request, timeout=10).jobs[0]

        wait_until(lambda: connected() == 2, "two workers connect", 100)
        submission = client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=[long_job(0)]), timeout=10)
        wait_until(lambda: job().state == types_pb2.JOB_STATE_LEASED, "the job is leased")
        first = job()
        # Deep in the pass, as its CPU time shows: tokenizing alone takes far less.
        busy = psutil.Process(workers[first.worker_id.rpartition("-")[0]].popen.pid)
        began = busy.cpu_times().user
        wait_until(lambda: busy.cpu_times().user > began + 0.5, "the pass is under way")
        assert job().state == types_pb2.JOB_STATE_LEASED
        killed = time.monotonic()
        workers.pop(first.worker_id.rpartition("-")[0]).kill()

        wait_until(lambda: job().attempt == 2, "another worker has it")
        # Back in the queue within two lease times, and leased at once.
        assert time.monotonic() - killed < 2 * LEASE + 1
        stream = client.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=submission.submission_id), timeout=100
        )
        chunks = [event.chunk for message in stream for event in message.events]

    (end,) = (chunk.end for chunk in chunks if chunk.HasField("end"))
    assert end.state == types_pb2.JOB_STATE_SUCCEEDED
    assert end.attempt == 2
    with reltrace.Client(address) as sdk:
        assert dict(sdk.status().ended) == {"SUCCEEDED": 1}
    (survivor,) = workers.values()
    assert survivor.stop() == 0


def children(process: Process, module: str) -> list[psutil.Process]:
    found = psutil.Process(process.popen.pid).children(recursive=True)
    return [child for child in found if any(module in part for part in child.cmdline())]


@pytest.mark.slow
def test_up_outlives_its_parts_and_takes_them_along(start: Start, tmp_path: Path) -> None:
    options = ("--port", "0", "--data", str(tmp_path / "data"))
    service = start("reltrace", "up", *options, RELTRACE_LEASE=str(LEASE))
    address = address_in(service.first_line())
    prompts = [f"I have {n} cats and 3 dogs. My cats love to play with my" for n in range(400)]
    with reltrace.Client(address) as client:
        before = client.trace(prompts[0], timeout=60)
        stream = client.trace_many(prompts, ordered=True, timeout=100)
        first = next(stream)
        # In the middle of it the scheduler dies, and its Redis with it.
        (scheduler,) = children(service, "reltrace_scheduler")
        scheduler.kill()
        traces = [first, *stream]
        assert [trace.id for trace in traces] == list(range(400))
        assert all(isinstance(trace, reltrace.Trace) for trace in traces)

        (worker,) = children(service, "reltrace_worker")
        worker.kill()
        after = client.trace(prompts[0], timeout=100)
        assert (after.relevance == before.relevance).all()

    left = psutil.Process(service.popen.pid).children(recursive=True)
    assert len(left) >= 3  # scheduler, Redis, worker
    service.kill()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive


@pytest.mark.slow
def test_a_worker_that_is_asked_to_stop_hands_its_jobs_back(
    start: Start, tmp_path: Path, slow_model: Path
) -> None:
    scheduler = start(
        "reltrace_scheduler", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "data"),
        "--lease", "60",
    )  # fmt: skip
    address = scheduler.first_line().split()[-1]
    options = ("--scheduler", address, "--model", str(slow_model), "--max-tokens", "1")
    worker = start("reltrace_worker", *options)
    with reltrace.Client(address, retry_timeout=100) as client:
        jobs = [{"input_ids": list(long_job(seed, 500).input_ids.ids)} for seed in range(3)]
        results: list[reltrace.Trace | reltrace.Failure] = []
        thread = threading.Thread(target=lambda: results.extend(client.trace_many(jobs)))
        thread.start()
        wait_until(lambda: any(q.leased for q in client.status().queues), "a lease", 100)
        assert worker.stop() == 0
        # The lease is a minute long: only handing back explains that it is free so soon.
        status = client.status()
        assert not any(queue.leased for queue in status.queues)
        assert not status.workers
        start("reltrace_worker", *options)
        thread.join(100)
    assert len(results) == 3
    assert all(isinstance(result, reltrace.Trace) for result in results)
