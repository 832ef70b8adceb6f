"""Commands for operators."""

from __future__ import annotations

import json

import pytest
from cli.conftest import Run
from fake_server import FakeServer
from reltrace_proto.v1 import admin_pb2, types_pb2


@pytest.fixture
def quarantined(server: FakeServer) -> None:
    for name in ("a-0", "b-0"):
        spec = types_pb2.JobSpec(model="m", prompt=f"[red]{name} " + "x" * 100)
        job = admin_pb2.QuarantinedJob(job_id=name, tenant="team-a", spec=spec)
        job.lost_leases.add(attempt=2, worker_id="gpu-1").lost_at.FromSeconds(1_700_000_000)
        server.quarantined.append(job)


@pytest.mark.usefixtures("quarantined")
def test_quarantined_jobs(command: Run, server: FakeServer) -> None:
    code, out, _ = command("quarantined", "list")
    assert code == 0
    assert "[red]" in out
    jobs = json.loads(command("quarantined", "list", "--json", "--limit", "1")[1])
    assert [job["id"] for job in jobs] == ["a-0"]
    code, out, _ = command("quarantined", "show", "b-0")
    assert "attempt 2 was lost by worker gpu-1 at 2023-11-14 22:13:20 UTC" in out
    assert "x" * 100 in out
    assert json.loads(command("quarantined", "show", "b-0", "--json")[1])["tenant"] == "team-a"
    code, _, err = command("quarantined", "show", "c-0")
    assert (code, err) == (
        1,
        "reltrace: no quarantined job 'c-0'; `reltrace quarantined list` lists them\n",
    )


@pytest.mark.usefixtures("quarantined")
def test_quarantined_jobs_are_queued_again(command: Run, server: FakeServer) -> None:
    assert command("quarantined", "requeue", "a-0") == (0, "a-0 is queued as again-a-0\n", "")
    assert command("quarantined", "requeue", "--all", "--json")[1] == (
        '[{"quarantined_id": "b-0", "id": "again-b-0"}]\n'
    )
    assert command("quarantined", "requeue", "--all") == (0, "no quarantined jobs\n", "")
    assert command("quarantined", "list") == (0, "no quarantined jobs\n", "")
    assert command("dead", "list") == command("quarantined", "list")
    assert command("quarantined", "requeue", "z-0")[0] == 1
    assert command("quarantined", "requeue")[0] == 2
    assert command("quarantined", "requeue", "a-0", "--all")[0] == 2


def test_tenants(command: Run) -> None:
    assert command("tenants", "list") == (0, "no tenants\n", "")
    assert command("tenants", "set", "team-a", "--weight", "2.5")[0] == 0
    out = command("tenants", "set", "team-a", "--max-jobs", "7", "--json")[1]
    assert json.loads(out)["max_jobs"] == 7
    assert "2.5" in command("tenants", "list")[1]
    (tenant,) = json.loads(command("tenants", "list", "--json")[1])
    assert (tenant["weight"], tenant["max_jobs"], tenant["max_bytes"]) == (2.5, 7, None)
    assert command("tenants", "set", "team-a", "--max-jobs", "-1")[0] == 2
