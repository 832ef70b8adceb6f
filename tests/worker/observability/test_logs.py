"""Log lines about jobs name the job, its tenant and the worker."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import structlog
from reference.loaded import Checkpoints
from reltrace_proto.telemetry import LogFormat, configure_logs
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine
from reltrace_worker.session.leases import FailedAttempt
from reltrace_worker.session.runner import Runner

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What was logged as JSON so far."""
    said = io.StringIO()
    with redirect_stderr(said):
        configure_logs("info", LogFormat.JSON, worker="gpu-1-00ff")
    yield lambda: [json.loads(line) for line in said.getvalue().splitlines()]
    structlog.reset_defaults()


def lease(job: str, **fields: Any) -> worker_pb2.Lease:
    ids = types_pb2.TokenIds(ids=range(20, 26))
    spec = types_pb2.JobSpec(input_ids=ids, **fields)
    return worker_pb2.Lease(job_id=job, attempt=1, spec=spec, tenant="team-a")


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


@pytest.mark.parametrize("form", LogFormat)
@pytest.mark.parametrize("broken", ["tokenizer", "engine", "encoder"])
async def test_no_prompt_is_in_a_log(
    checkpoints: Checkpoints,
    form: LogFormat,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    Given a prompt, and an error in its tokenizer, pass or result that quotes it
    I expect a line that says where it was raised, and the prompt nowhere.
    """
    loaded = checkpoints.loaded("plain")
    engine = Engine(loaded)
    runner = Runner(loaded, engine, max_tokens=50)

    def fail(*arguments: object) -> None:
        prompt = "ankara " * 3
        try:
            raise KeyError(prompt)
        except KeyError as error:
            raise ValueError(f"can not do {prompt}") from error

    monkeypatch.setattr(*{
        "tokenizer": (runner._preparer, "prepare"),
        "engine": (engine, "run"),
        "encoder": (runner._encoder, "_encode"),
    }[broken], fail)  # fmt: skip
    configure_logs("info", form)
    spec = types_pb2.JobSpec(prompt="ankara " * 3)
    ended = await runner.add([worker_pb2.Lease(job_id="j-0", attempt=1, spec=spec)])
    assert ended or await runner.next_results()
    structlog.reset_defaults()
    said = capsys.readouterr()
    assert "_failed" in said.err or "pass.failed" in said.err
    assert "in fail" in said.err
    assert "KeyError" in said.err
    assert "ankara" not in (said.err + said.out).replace('"ankara " * 3', "")


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
