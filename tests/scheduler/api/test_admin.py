import asyncio

import grpc
import pytest
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, trace_pb2, types_pb2
from scheduler.fake_worker import FakeWorker

JobSpec = types_pb2.JobSpec


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> "admin_pb2_grpc.AdminServiceAsyncStub":
    return admin_pb2_grpc.AdminServiceStub(channel)


async def die(
    client,
    channel: grpc.aio.Channel,
    spec: types_pb2.JobSpec,
    priority: types_pb2.Priority.ValueType = types_pb2.PRIORITY_INTERACTIVE,
) -> str:
    """Let a job lose three workers; return its id."""
    await FakeWorker(channel, "w0").connect()
    answer = await client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=[spec], priority=priority))
    for number in range(3):
        worker = FakeWorker(channel, f"w{number}")
        await worker.connect()
        await worker.lease(1)
        worker.call.cancel()
    request = trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)
    async with asyncio.timeout(20):
        async for _ in client.StreamResults(request):
            pass
    return answer.job_ids[0]


@pytest.mark.parametrize(
    "priority", [types_pb2.PRIORITY_INTERACTIVE, types_pb2.PRIORITY_BATCH], ids=["i", "b"]
)
async def test_a_quarantined_job_is_shown_with_its_history_and_can_be_queued_again(
    client, channel, admin, priority: types_pb2.Priority.ValueType
) -> None:
    spec = JobSpec(prompt="deadly", sites=["resid"])
    quarantined_id = await die(client, channel, spec, priority)

    (job,) = (await admin.ListQuarantinedJobs(admin_pb2.ListQuarantinedJobsRequest())).jobs
    assert (job.job_id, job.tenant, job.spec.prompt) == (quarantined_id, "default", "deadly")
    assert [(x.attempt, x.worker_id) for x in job.lost_leases] == [(1, "w0"), (2, "w1"), (3, "w2")]

    request = admin_pb2.RequeueQuarantinedJobsRequest(job_ids=[quarantined_id])
    (queued,) = (await admin.RequeueQuarantinedJobs(request)).jobs
    assert queued.quarantined_job_id == quarantined_id
    worker = FakeWorker(channel, "good")
    await worker.connect()
    (lease,) = await worker.lease(1)
    assert (lease.job_id, lease.attempt, lease.spec.prompt) == (queued.job_id, 1, "deadly")
    assert lease.priority == priority
    assert not (await admin.ListQuarantinedJobs(admin_pb2.ListQuarantinedJobsRequest())).jobs
    with pytest.raises(grpc.aio.AioRpcError, match="no quarantined job") as error:
        await admin.RequeueQuarantinedJobs(request)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_tenants_are_set_and_shown(client, admin, worker: FakeWorker) -> None:
    answer = await admin.SetTenant(admin_pb2.SetTenantRequest(tenant="a", weight=2, max_jobs=9))
    assert (answer.tenant.weight, answer.tenant.max_jobs) == (2, 9)
    assert not answer.tenant.HasField("max_bytes")
    await client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=[JobSpec(prompt="p")] * 3))
    tenants = (await admin.ListTenants(admin_pb2.ListTenantsRequest())).tenants
    assert [(t.tenant, t.jobs, t.weight) for t in tenants] == [("a", 0, 2), ("default", 3, 0)]
    assert tenants[1].bytes > 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a:b"}, "tenant"),
        ({"tenant": "a", "weight": 0}, "weight"),
        ({"tenant": "a", "weight": float("nan")}, "weight"),
        ({"tenant": "a", "weight": 1e9}, "weight"),
    ],
)
async def test_bad_settings_are_refused(admin, fields: dict, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await admin.SetTenant(admin_pb2.SetTenantRequest(**fields))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith(f"{field}:")
