"""A run asks for the revision of a model that it began with, whatever is served meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import reltrace
from fake_server import FakeServer
from reltrace.calls import pinning
from reltrace_proto.v1 import types_pb2

UPGRADED = [("fake", "r1", 1), ("fake", "r2", 1)]


def asked_for(server: FakeServer) -> set[str]:
    return {spec.model for sent in server.submissions.values() for spec in sent.specs}


def upgrade(server: FakeServer) -> None:
    server.served = UPGRADED


@pytest.mark.parametrize("model", [None, "fake"])
def test_an_upgrade_in_the_middle_of_a_run_changes_nothing_in_it(
    server: FakeServer, client: reltrace.Client, model: str | None
) -> None:
    server.before_answer = lambda: upgrade(server)
    items = [*["a"] * 300, {"prompt": "b", "model": "fake"}]
    found = list(client.trace_many(items, model=model, max_in_flight=16))
    assert not [one for one in found if isinstance(one, reltrace.Failure)]
    assert len(server.submissions) > 1
    assert asked_for(server) == {"fake@r1"}


def test_all_of_an_evaluation_asks_for_one_revision(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.before_answer = lambda: upgrade(server)
    client.evaluate(["a b c", "d e f"], rules=["attnlrp"], points=2)
    assert len(server.submissions) > 1
    assert asked_for(server) == {"fake@r1"}


@pytest.mark.parametrize("model", [None, "fake"])
def test_a_name_that_means_two_is_refused(
    server: FakeServer, client: reltrace.Client, model: str | None
) -> None:
    upgrade(server)
    items = ["a", {"prompt": "b", "model": "fake@r2"}]
    first, second = client.trace_many(items, model=model, ordered=True)
    assert isinstance(first, reltrace.Failure)
    assert isinstance(first.reason, reltrace.InvalidArgument)
    said = "model: 'fake' is served in 2 revisions; ask for one of them as NAME@REVISION: "
    assert str(first.reason) == said + "fake@r1, fake@r2"
    assert isinstance(second, reltrace.Trace)
    assert asked_for(server) == {"fake@r2"}


def test_of_several_models_the_one_that_has_workers_is_the_default(
    server: FakeServer, client: reltrace.Client
) -> None:
    server.served = [("gone", "r0", 0), ("fake", "r2", 1)]
    list(client.trace_many(["a"]))
    assert asked_for(server) == {"fake@r2"}


def test_a_name_that_is_not_listed_is_left_to_the_server(
    server: FakeServer, client: reltrace.Client
) -> None:
    list(client.trace_many(["a"], model="other"))
    assert asked_for(server) == {"other"}


def test_a_revision_that_goes_away_ends_the_run(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given a run whose revision is not served any more, and another one is
    I expect an error once that has lasted for the client's patience, and a word before.
    """
    monkeypatch.setattr(pinning, "_CHECK_INTERVAL", 0.05)
    release = threading.Event()
    server.hold = lambda spec: bool(release.wait(30))  # type: ignore[assignment,return-value]
    server.before_answer = lambda: setattr(server, "served", [("fake", "r2", 1)])
    message = "this run asks for fake@r1, which no worker serves any more; served: fake@r2"
    try:
        with (
            reltrace.Client(server.address, retry_timeout=0.2) as client,
            pytest.raises(reltrace.ModelNotFound, match=f"model: {message}$"),
        ):
            list(client.trace_many(["a"]))
    finally:
        release.set()
    assert f"{message}; waiting 0 s for it" in caplog.text
    server.wait_cancelled("s0-0")


def test_an_atlas_whose_revision_goes_away_ends(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pinning, "_CHECK_INTERVAL", 0.05)
    release = threading.Event()
    server.hold = lambda spec: bool(release.wait(30))  # type: ignore[assignment,return-value]
    server.before_answer = lambda: setattr(server, "served", [("fake", "r2", 1)])
    try:
        with (
            reltrace.Client(server.address, retry_timeout=0.2) as client,
            pytest.raises(reltrace.ModelNotFound, match="asks for fake@r1, which no worker"),
        ):
            client.build_atlas(["a"], tmp_path)
    finally:
        release.set()
    server.wait_cancelled("s0-0")


def test_a_worker_that_starts_again_is_waited_for(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a run whose model nobody serves for longer than the client's patience
    I expect it to go on once a worker is there again: no other revision has come.
    """
    monkeypatch.setattr(pinning, "_CHECK_INTERVAL", 0.02)
    looks = threading.Semaphore(0)

    def look(method: str) -> None:
        if method == "ListModels":
            looks.release()

    def away(spec: types_pb2.JobSpec) -> None:
        server.served, server.before = [("fake", "r1", 0)], look
        for _ in range(10):
            assert looks.acquire(timeout=30)

    server.hold = away
    with reltrace.Client(server.address, retry_timeout=0.05) as client:
        (trace,) = client.trace_many(["a"])
    assert isinstance(trace, reltrace.Trace)


def test_the_first_worker_is_waited_for(server: FakeServer, client: reltrace.Client) -> None:
    server.served = []
    looks = iter(range(5))

    def look(method: str) -> None:
        if method == "ListModels" and next(looks) == 2:
            server.served = [("fake", "r1", 1)]

    server.before = look
    list(client.trace_many(["a"]))
    assert asked_for(server) == {"fake@r1"}


def test_a_server_that_no_worker_comes_to_is_given_up(server: FakeServer) -> None:
    server.served = []
    with (
        reltrace.Client(server.address, retry_timeout=0.2) as client,
        pytest.raises(reltrace.Unavailable, match="no worker has connected yet"),
    ):
        list(client.trace_many(["a"]))
