"""What the worker says: who, about whose job."""

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import structlog
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine
from reltrace_worker.observability.logs import LogFormat, configure, level_of
from reltrace_worker.session.leases import FailedAttempt
from reltrace_worker.session.runner import Runner

Lines = Callable[[], list[dict[str, Any]]]

log = structlog.get_logger()


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What was logged as JSON so far."""
    said = io.StringIO()
    with redirect_stderr(said):
        configure(logging.INFO, LogFormat.JSON, "gpu-1-00ff")
    yield lambda: [json.loads(line) for line in said.getvalue().splitlines()]
    structlog.reset_defaults()


def lease(job: str, **fields: Any) -> worker_pb2.Lease:
    ids = types_pb2.TokenIds(ids=range(20, 26))
    spec = types_pb2.JobSpec(input_ids=ids, **fields)
    return worker_pb2.Lease(job_id=job, attempt=1, spec=spec, tenant="team-a")


def test_every_line_is_an_object_that_names_the_worker(lines: Lines) -> None:
    log.info("one", job="j-1")
    log.debug("not shown")
    # Passes run on threads of their own.
    thread = threading.Thread(target=lambda: log.warning("two\nlines"))
    thread.start()
    thread.join()
    first, second = lines()
    assert (first["event"], first["job"], first["level"]) == ("one", "j-1", "info")
    assert (second["event"], second["worker"]) == ("two\nlines", "gpu-1-00ff")
    assert first["worker"] == "gpu-1-00ff"
    assert first["timestamp"].endswith("Z")


def test_an_exception_stays_on_its_line(lines: Lines) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    (line,) = lines()
    assert "ValueError: broken" in line["exception"]


def test_people_are_told_the_worker_too() -> None:
    said = io.StringIO()
    with redirect_stderr(said):
        configure(logging.INFO, LogFormat.CONSOLE, "gpu-1-00ff")
        log.info("one", job="j-1")
    structlog.reset_defaults()
    assert "worker=gpu-1-00ff" in said.getvalue()
    assert "job=j-1" in said.getvalue()


@pytest.mark.parametrize(("name", "level"), [("warning", 30), ("DEBUG", 10), ("loud", None)])
def test_levels(name: str, level: int | None) -> None:
    assert level_of(name) == level


async def test_a_pass_that_fails_names_job_and_tenant(
    checkpoints: Checkpoints, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given two jobs in a pass that fails, together and one by one
    I expect a line for each with job, tenant and worker.
    """
    loaded = checkpoints.loaded("plain")
    engine = Engine(loaded)

    def run(jobs: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(engine, "run", run)
    runner = Runner(loaded, engine, max_tokens=50)
    assert await runner.add([lease("j-0"), lease("j-1")]) == []
    results = await runner.next_results()
    assert [isinstance(result, FailedAttempt) for result in results] == [True, True]
    split, *failed = lines()
    assert (split["event"], split["jobs"]) == ("pass.split", 2)
    assert [(line["event"], line["job"], line["tenant"], line["worker"]) for line in failed] == [
        ("pass.failed", f"j-{number}", "team-a", "gpu-1-00ff") for number in range(2)
    ]


async def test_a_store_that_takes_nothing_is_told_with_job_and_tenant(
    checkpoints: Checkpoints, lines: Lines, tmp_path: Path
) -> None:
    """
    Given a file where a batch's folder should be
    I expect the attempts to fail, and a line for each with the store's own words.
    """
    (tmp_path / "file").write_text("in the way")
    loaded = checkpoints.loaded("plain")
    runner = Runner(loaded, Engine(loaded), max_tokens=50)
    uri = (tmp_path / "file").as_uri()
    await runner.add([lease("j-0", output_uri=uri), lease("j-1", output_uri=uri)])
    results = await runner.next_results()
    assert all(isinstance(result, FailedAttempt) for result in results)
    told = lines()
    assert [(line["event"], line["job"], line["tenant"]) for line in told] == [
        ("store.failed", "j-0", "team-a"),
        ("store.failed", "j-1", "team-a"),
    ]
    assert all(uri in line["error"] for line in told)
