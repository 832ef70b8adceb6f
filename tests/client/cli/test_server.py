"""Commands that ask a server about itself."""

from __future__ import annotations

import json
from typing import Any

from cli.conftest import Run
from fake_server import FakeServer, Submission
from reltrace_proto.v1 import types_pb2


def test_workers(command: Run) -> None:
    code, out, _ = command("workers")
    assert code == 0
    assert "w1" in out
    assert "fake-2" in out
    (worker,) = json.loads(command("workers", "--json")[1])
    assert (worker["id"], worker["model"], worker["leased"]) == ("w1", "fake", 1)


def test_a_worker_that_stands_still_is_told(command: Run, server: FakeServer) -> None:
    server.silent = 40.4
    assert "w1 (stalled 40 s)" in command("workers")[1]


def test_workers_are_drained(command: Run, server: FakeServer) -> None:
    assert command("workers", "drain", "w1") == (0, "1 worker told to drain\n", "")
    assert server.drained == ["w1"]
    assert "(draining)" in command("workers")[1]
    assert command("workers", "drain")[0] == 2
    code, out, err = command("workers", "drain", "w7")
    assert (code, out) == (1, "")
    assert "no worker 'w7' is connected" in err


def test_cancel(command: Run, server: FakeServer) -> None:
    server.submissions["s0"] = Submission("s0", "key", ["s0-0"], [types_pb2.JobSpec(prompt="a")])
    assert command("cancel", "s0-0", "s7-1") == (0, "cancelled 1 job\n", "")
    assert server.cancelled == ["s0-0"]
    assert command("cancel", "s0-0") == (1, "cancelled 0 jobs\n", "")
    assert command("cancel", "s0-0", "--json") == (1, '{"cancelled": 0}\n', "")
    assert command("cancel", "a b")[2].startswith("reltrace: ids[0]: must be ")
    assert command("cancel", "s9") == (1, "", "reltrace: the submission is not known here\n")
    assert command("cancel")[0] == 2


def test_models(command: Run) -> None:
    code, out, _ = command("models")
    assert code == 0
    assert "1,234,567" in out
    assert "fake@r1: sites embed, resid; rules attnlrp; reductions token\n" in out
    (model,) = json.loads(command("models", "--json")[1])
    assert (model["name"], model["workers"]) == ("fake", 2)


def test_models_are_forgotten(command: Run, server: FakeServer) -> None:
    server.served = [("fake", "r1", 2), ("typo", "r2", 0), ("typo-2", "r2", 0)]
    code, out, _ = command("models", "--forget", "typo", "--forget", "typo-2", "--json")
    assert code == 0
    assert [model["name"] for model in json.loads(out)] == ["fake"]
    code, out, err = command("models", "--forget", "typo")
    assert (code, out) == (1, "")
    assert "no model 'typo' is known" in err


def test_status(command: Run) -> None:
    code, out, _ = command("status")
    assert code == 0
    assert "Redis 7.2, 1.0 MB; ended: 5 succeeded" in out
    assert "1 worker" in out
    state: Any = json.loads(command("status", "--json")[1])
    assert state["queues"] == [{"model": "fake", "queued": 3, "leased": 1}]
    assert state["tenants"][0]["unread_bytes"] == 1200
    assert "bytes of unread results" in out
    assert "1,200" in out
    assert state["workers"][0]["connected_at"] == "2023-11-14T22:13:20+00:00"
