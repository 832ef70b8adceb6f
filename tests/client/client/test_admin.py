"""What operators ask."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import reltrace
from fake_server import FakeServer
from reltrace_proto.v1 import admin_pb2, types_pb2


def quarantined_job(job_id: str, **spec: object) -> admin_pb2.QuarantinedJob:
    job = admin_pb2.QuarantinedJob(job_id=job_id, tenant="team-a", spec=types_pb2.JobSpec(**spec))
    lost = job.lost_leases.add(attempt=2, worker_id="gpu-1")
    lost.lost_at.FromSeconds(1_700_000_000)
    return job


def test_quarantined_jobs_with_their_history(server: FakeServer, client: reltrace.Client) -> None:
    ids = types_pb2.TokenIds(ids=[5, 6])
    server.quarantined = [
        quarantined_job("a-0", prompt="x", model="m"),
        quarantined_job("b-0", input_ids=ids),
    ]
    first, second = client.admin.quarantined_jobs()
    assert (first.id, first.tenant, first.model) == ("a-0", "team-a", "m")
    assert (first.prompt, first.input_ids) == ("x", ())
    assert (second.prompt, second.input_ids) == (None, (5, 6))
    when = datetime.fromtimestamp(1_700_000_000, UTC)
    assert first.lost_leases == (reltrace.LostLease(2, "gpu-1", when),)
    assert len(client.admin.quarantined_jobs(limit=1)) == 1


def test_quarantined_jobs_are_queued_again(server: FakeServer, client: reltrace.Client) -> None:
    server.quarantined = [quarantined_job("a-0", prompt="x"), quarantined_job("b-0", prompt="y")]
    assert client.admin.requeue("b-0") == [reltrace.Requeued("b-0", "again-b-0")]
    assert [job.id for job in client.admin.quarantined_jobs()] == ["a-0"]
    with pytest.raises(reltrace.NotFound, match=r"job_ids\[1\]: no quarantined job 'c-0'"):
        client.admin.requeue("a-0", "c-0")


def test_workers(client: reltrace.Client) -> None:
    (worker,) = client.admin.workers()
    assert (worker.id, worker.model, worker.further_models) == ("w1", "fake", ("fake-2",))
    assert (worker.device, worker.version, worker.leased) == ("cpu", "0.1.0", 1)
    assert worker.connected_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert worker.seen_at is None
    assert not worker.draining


def test_workers_are_drained(server: FakeServer, client: reltrace.Client) -> None:
    with pytest.raises(reltrace.NotFound, match=r"worker_ids\[1\]: no worker 'w7' is connected"):
        client.admin.drain("w1", "w7")
    assert server.drained == []
    client.admin.drain("w1")
    assert server.drained == ["w1"]
    assert [worker.draining for worker in client.admin.workers()] == [True]
    with pytest.raises(reltrace.InvalidArgument, match=r"worker_ids\[1\]: must be str, not int"):
        client.admin.drain("w1", 7)  # type: ignore[arg-type]


def test_models_are_forgotten(server: FakeServer, client: reltrace.Client) -> None:
    server.served = [("fake", "r1", 2), ("typo", "r2", 0)]
    with pytest.raises(reltrace.NotFound, match=r"models\[0\]: no model 'nope' is known"):
        client.admin.forget_models("nope")
    assert client.admin.forget_models("typo") == ["typo", "typo@r2"]
    assert [model.name for model in client.models()] == ["fake"]
    with pytest.raises(reltrace.InvalidArgument, match=r"names\[0\]: must be str, not int"):
        client.admin.forget_models(7)  # type: ignore[arg-type]


def test_tenants(client: reltrace.Client) -> None:
    assert client.admin.tenants() == []
    tenant = client.admin.set_tenant("team-a", weight=2.5)
    assert (tenant.name, tenant.weight, tenant.max_jobs) == ("team-a", 2.5, None)
    client.admin.set_tenant("team-a", max_jobs=10, max_bytes=1 << 20)
    (tenant,) = client.admin.tenants()
    assert (tenant.weight, tenant.max_jobs, tenant.max_bytes) == (2.5, 10, 1 << 20)


async def test_awaitable(server: FakeServer) -> None:
    server.quarantined = [quarantined_job("a-0", prompt="x")]
    async with reltrace.AsyncClient(server.address) as client:
        assert len(await client.admin.quarantined_jobs()) == 1
        assert len(await client.admin.requeue("a-0")) == 1
        assert (await client.admin.set_tenant("t", weight=1)).weight == 1
        assert len(await client.admin.tenants()) == 1
        await client.admin.drain("w1")
        assert [worker.draining for worker in await client.admin.workers()] == [True]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, 2**40])
def test_a_limit_that_is_none(client: reltrace.Client, limit: object) -> None:
    with pytest.raises(
        reltrace.InvalidArgument, match="limit: must be a whole number from 1 to 4294967295"
    ):
        client.admin.quarantined_jobs(limit)  # type: ignore[arg-type]


def test_values_that_are_none(client: reltrace.Client) -> None:
    with pytest.raises(reltrace.InvalidArgument, match=r"job_ids\[0\]: must be str, not int"):
        client.admin.requeue(7)  # type: ignore[arg-type]
    with pytest.raises(reltrace.InvalidArgument, match="tenant: "):
        client.admin.set_tenant("a", max_jobs=-1)
