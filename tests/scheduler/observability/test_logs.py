"""What a scheduler logs when something goes wrong has no text of a job."""

from typing import Any

import grpc
import pytest
import redis
import structlog
from reltrace_proto.telemetry import LogFormat, configure_logs
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.api import trace
from reltrace_scheduler.queue.recent import RecentJobs
from reltrace_scheduler.queue.shards import Shards
from scheduler.fake_worker import FakeWorker

SECRET = "ankara"


@pytest.mark.parametrize("form", LogFormat)
async def test_an_internal_error_over_a_prompt(
    client: Any,
    worker: FakeWorker,
    form: LogFormat,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    Given a fault of the scheduler while it holds a prompt, whose error quotes it
    I expect a line that says where it was raised, and the prompt nowhere.
    """

    def fail(request: trace_pb2.SubmitJobsRequest, *others: object) -> None:
        prompt = request.jobs[0].prompt
        raise ValueError(f"can not take {prompt}")

    monkeypatch.setattr(trace, "check_submission", fail)
    configure_logs("info", form)
    request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt=SECRET)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(request, timeout=10)
    structlog.reset_defaults()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    said = capsys.readouterr()
    assert "rpc.failed" in said.err
    assert "in fail" in said.err
    assert SECRET not in said.err + said.out + str(caught.value.details())


async def test_a_failed_attempt_whose_reason_quotes_its_prompt(
    client: Any, channel: grpc.aio.Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("info", LogFormat.JSON)
    worker = FakeWorker(channel)
    await worker.connect()
    request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt=SECRET)])
    await client.SubmitJobs(request, timeout=10)
    (lease,) = await worker.lease(1)
    ref = worker_pb2.LeaseRef(job_id=lease.job_id, attempt=lease.attempt)
    error = types_pb2.JobError(message=f"can not do {SECRET}")
    await worker.send(release=worker_pb2.Release(leases=[ref], error=error))
    # It comes back: the release has been handled.
    await worker.lease(1)
    structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "attempt.failed" in said
    assert SECRET not in said


async def test_a_command_that_redis_refuses(
    store: redis.asyncio.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Given a full Redis, which refuses to note a job that ended
    I expect its reason without the command, which holds the beginning of the prompt.
    """
    configure_logs("info", LogFormat.JSON)
    await store.config_set("maxmemory", 1)
    try:
        recent = RecentJobs(Shards(store, 1), enabled=True)
        await recent.note([({"text": SECRET, "job": "j-1", "state": "SUCCEEDED"}, b"")])
    finally:
        await store.config_set("maxmemory", 0)
    structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "used memory > 'maxmemory'" in said
    assert SECRET not in said
