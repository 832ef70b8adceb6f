"""`reltrace batch`, as it is called."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import reltrace
from cli.conftest import Run
from fake_server import FakeServer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("one a\ntwo b\nthree c\n")
    return path


def test_a_file(command: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, progress = command("batch", str(source), str(out))
    assert code == 0
    assert said.startswith(f"{out}: 3 prompts traced; 3 in this run, ")
    assert "3/3" in progress
    assert [trace.id for trace in reltrace.load_batch(out)] == [0, 1, 2]
    code, said, _ = command("batch", str(source), str(out), "--json", "--quiet")
    summary = json.loads(said)
    assert (summary["traced"], summary["failed"], summary["new"]) == (3, 0, 0)


def test_its_options_are_those_of_trace(command: Run, source: Path, server: FakeServer) -> None:
    options = ("--site", "embed", "--rule", "attnlrp", "--target", "id:5", "--layer", "1")
    options += ("--dtype", "bfloat16", "--model", "fake", "--limit", "1")
    options += ("--output-uri", "s3://bucket/run/")
    assert command("batch", str(source), str(source.parent / "out"), *options)[0] == 0
    (spec,) = server.requests[0].jobs
    assert (list(spec.sites), spec.rule, spec.model) == (["embed"], "attnlrp", "fake@r1")
    assert (spec.targets[0].token.id, list(spec.layers), spec.dtype) == (5, [1], 2)
    assert spec.output_uri == "s3://bucket/run"
    assert server.requests[0].priority == 2


def test_failures_set_the_exit_code(command: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('"fine"\n{\n')
    code, said, progress = command("batch", str(source), str(tmp_path / "out"))
    assert code == 1
    assert "1 prompt traced, 1 failed (see errors.jsonl)" in said
    assert "failed=1" in progress
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 1


def test_quiet(command: Run, source: Path, tmp_path: Path) -> None:
    assert command("batch", str(source), str(tmp_path / "out"), "--quiet")[2] == ""


def test_json_output(command: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shard in ("1/2", "2/2"):
        code, _, progress = command("batch", str(source), str(out), "--shard", shard)
        assert code == 0
        assert {"1/2": "2/2", "2/2": "1/1"}[shard] in progress
    assert [trace.id for trace in reltrace.load_batch(out)] == [0, 1, 2]


ERRORS = {
    ("nowhere.txt",): "input: there is no file 'nowhere.txt'",
    ("IN", "--shard", "3/2"): "shard: must be I/N with I from 1 to N, such as 2/8, not '3/2'",
    ("IN", "--shard", "x"): "shard: must be I/N",
    ("IN", "--input-format", "csv"): "column: 'prompt' is not in the file; it has one a",
    ("IN", "--column", "x"): "column: is for csv and parquet; text has no columns",
    ("IN", "--rule", "x"): "rule: 'x' is not served; fake has attnlrp",
    ("IN", "--model", "x"): "model: 'x' is not served; served: fake",
    ("IN", "--output-uri", "/srv/x"): "output_uri: must be a URL such as s3://bucket/folder, not",
    ("IN", "--target", "id:x"): "target: after id: comes a token id",
    ("IN", "--reduce", "token", "--top-k", "3"): 'top_k: is for reduce="topk"',
}


@pytest.mark.parametrize("arguments", ERRORS, ids=" ".join)
def test_errors_are_one_line(
    command: Run, source: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    given = [str(source) if part == "IN" else part for part in arguments]
    code, _, err = command("batch", given[0], str(tmp_path / "out"), *given[1:], "--quiet")
    assert code == 1
    assert err.startswith(f"reltrace: {ERRORS[arguments]}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--format", "--input-format", "--dtype", "--limit"])
def test_wrong_usage_exits_with_2(command: Run, source: Path, tmp_path: Path, option: str) -> None:
    code, _, err = command("batch", str(source), str(tmp_path / "out"), option, "x")
    assert code == 2
    assert option in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stuck(server: FakeServer) -> Iterator[FakeServer]:
    """A server on which the third job does not end."""
    release = threading.Event()
    server.hold = lambda spec: (release.wait(30), None)[1] if "three" in spec.prompt else None
    yield server
    release.set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_results_so_far(
    stuck: FakeServer, source: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from reltrace.cli.app import main; main()"
    )
    arguments = ["batch", str(source), str(out), "--server", stuck.address, "--quiet"]
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--part-seconds", "0.1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (out / "journal.sqlite").exists() or len(reltrace.load_batch(out)) < 2:
            assert child.poll() is None
        child.send_signal(number)
        _, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert (child.returncode, errors.count("\n")) == (code, 1)
    assert "the same command continues from there" in errors
    assert [trace.id for trace in reltrace.load_batch(out)] == [0, 1]
    with stuck.changed:
        assert stuck.changed.wait_for(lambda: stuck.cancelled, 5)
    # In whichever submission it came.
    assert stuck.cancelled == [
        job_id
        for submission in stuck.submissions.values()
        for job_id, spec in zip(submission.job_ids, submission.specs, strict=True)
        if "three" in spec.prompt
    ]


def test_standard_input(stuck: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "reltrace", "batch", "-", str(out), "--server", stuck.address],
        input='{"id": "x", "prompt": "a b"}\n"c d"\n',
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [trace.id for trace in reltrace.load_batch(out)] == ["x", 1]


def test_an_unreachable_server_is_logged_beside_the_bar(
    server: FakeServer, command: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reltrace.transport.retry._LOG_AFTER", 0.2)
    away = threading.Thread(target=server.stop)

    def hold(spec: object) -> None:
        if not away.ident:
            away.start()
            away.join(10)

    server.hold = hold
    out = tmp_path / "out"
    code, _, err = command("batch", str(source), str(out), "--retry-timeout", "1", "--quiet")
    assert code == 1
    first, last = err.splitlines()
    assert first.startswith("reltrace: no answer from the reltrace server at")
    assert "; trying again for " in first
    assert "(tried for 1 s; is it running?" in last


def test_a_disk_that_is_full_is_told_with_the_file_and_the_batch_goes_on_later(
    server: FakeServer, tmp_path: Path
) -> None:
    """
    Given a batch whose files may not be as large as they have to be, as on a disk without room
    I expect one line that names the file; and the same command with room to end with all traces.
    """
    source, out = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("".join(f"prompt {number}\n" for number in range(300)))
    command = [sys.executable, "-m", "reltrace", "batch", str(source), str(out), "--quiet"]
    for limit, code in (("64", 1), ("unlimited", 0)):
        done = subprocess.run(
            ["bash", "-c", f'ulimit -f {limit}; "$@"', "bash", *command,
             "--server", server.address],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        lines = done.stderr.splitlines()
        if code:
            assert lines == [f"reltrace: {out}/part-000000.safetensors: File too large"]
    assert len(reltrace.load_batch(out)) == 300
    assert not list(out.glob("*.unfinished"))
