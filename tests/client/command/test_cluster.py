"""Commands for those who look after a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from command.conftest import Run
from fake_server import FakeServer, Submission
from reltrace._command import watch
from reltrace_proto.v1 import admin_pb2, types_pb2
from rich.text import Text


@pytest.fixture
def dead(server: FakeServer) -> None:
    for name in ("a-0", "b-0"):
        spec = types_pb2.JobSpec(model="m", prompt=f"[red]{name} " + "x" * 100)
        job = admin_pb2.DeadJob(job_id=name, tenant="team-a", spec=spec)
        job.lost_leases.add(attempt=2, worker_id="gpu-1").lost_at.FromSeconds(1_700_000_000)
        server.dead.append(job)


def test_workers(command: Run) -> None:
    code, out, _ = command("workers")
    assert code == 0
    assert "w1" in out
    assert "fake-2" in out
    (worker,) = json.loads(command("workers", "--json")[1])
    assert (worker["id"], worker["model"], worker["leased"]) == ("w1", "fake", 1)


def test_workers_are_drained(command: Run, server: FakeServer) -> None:
    assert command("workers", "drain", "w1") == (0, "1 worker told to leave\n", "")
    assert server.drained == ["w1"]
    assert "(drains)" in command("workers")[1]
    assert command("workers", "drain")[0] == 2


def test_watching_ends_with_an_interrupt(server: FakeServer) -> None:
    """
    Given a status that is watched, for machines
    I expect a line of JSON at every look, and an end in order on Ctrl-C.
    """
    # Python's own handler: a test run that ignores SIGINT would hand that down.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from reltrace._command.app import main; main()"
    )
    options = ["status", "--watch", "--every", "0.1", "--json", "--server", server.address]
    watching = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert watching.stdout is not None
        for _ in range(3):
            assert json.loads(watching.stdout.readline())["redis_version"] == "7.2"
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=20)
        assert watching.returncode == 0
    finally:
        watching.kill()
        watching.wait()


def test_what_is_watched_is_drawn_again(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([0, 40, 100])
    drawn: list[str] = []
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)

    def look() -> watch.View:
        count = next(looks, None)
        if count is None:
            raise KeyboardInterrupt
        drawn.append(f"{count} jobs")
        return watch.View(Text(drawn[-1]), count)

    watch.show(look, watch=True, every=1.0, as_json=False)
    assert drawn == ["0 jobs", "40 jobs", "100 jobs"]


def test_cancel(command: Run, server: FakeServer) -> None:
    server.submissions["s0"] = Submission("s0", "key", ["s0-0"], [types_pb2.JobSpec(prompt="a")])
    assert command("cancel", "s0-0", "s7-1") == (0, "cancelled 1 job\n", "")
    assert server.cancelled == ["s0-0"]
    assert command("cancel", "s0-0") == (1, "cancelled 0 jobs\n", "")
    assert command("cancel", "s0-0", "--json") == (1, '{"cancelled": 0}\n', "")
    assert command("cancel", "a b")[2].startswith("reltrace: ids[0]: must be ")
    assert command("cancel", "s9") == (1, "", "reltrace: the submission is not known here\n")
    assert command("cancel")[0] == 2


@pytest.mark.usefixtures("dead")
def test_dead_jobs(command: Run, server: FakeServer) -> None:
    code, out, _ = command("dead", "list")
    assert code == 0
    assert "[red]" in out
    jobs = json.loads(command("dead", "list", "--json", "--limit", "1")[1])
    assert [job["id"] for job in jobs] == ["a-0"]
    code, out, _ = command("dead", "show", "b-0")
    assert "attempt 2 was lost by worker gpu-1 at 2023-11-14 22:13:20 UTC" in out
    assert "x" * 100 in out
    assert json.loads(command("dead", "show", "b-0", "--json")[1])["tenant"] == "team-a"
    code, _, err = command("dead", "show", "c-0")
    assert (code, err) == (1, "reltrace: no dead job 'c-0'; `reltrace dead list` lists them\n")


@pytest.mark.usefixtures("dead")
def test_dead_jobs_are_queued_again(command: Run, server: FakeServer) -> None:
    assert command("dead", "requeue", "a-0") == (0, "a-0 is queued as again-a-0\n", "")
    assert command("dead", "requeue", "--all", "--json")[1] == (
        '[{"dead_id": "b-0", "id": "again-b-0"}]\n'
    )
    assert command("dead", "requeue", "--all") == (0, "no dead jobs\n", "")
    assert command("dead", "list") == (0, "no dead jobs\n", "")
    assert command("dead", "requeue", "z-0")[0] == 1
    assert command("dead", "requeue")[0] == 2
    assert command("dead", "requeue", "a-0", "--all")[0] == 2


def test_tenants(command: Run) -> None:
    assert command("tenants", "list") == (0, "no tenants\n", "")
    assert command("tenants", "set", "team-a", "--weight", "2.5")[0] == 0
    out = command("tenants", "set", "team-a", "--max-jobs", "7", "--json")[1]
    assert json.loads(out)["max_jobs"] == 7
    assert "2.5" in command("tenants", "list")[1]
    (tenant,) = json.loads(command("tenants", "list", "--json")[1])
    assert (tenant["weight"], tenant["max_jobs"], tenant["max_bytes"]) == (2.5, 7, None)
    assert command("tenants", "set", "team-a", "--max-jobs", "-1")[0] == 2
