"""Batches against a server that misbehaves as told."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import reltrace
from batch.conftest import Seen
from batch.written import LINES, Batch, check
from fake_results import failed_chunk
from fake_server import FakeServer, status_with
from google.rpc import code_pb2
from reltrace_proto.v1 import types_pb2


def test_every_prompt_has_its_trace(batch: Batch, tmp_path: Path) -> None:
    seen = Seen()
    summary = batch(LINES, progress=seen, part_traces=7)
    assert (summary.traced, summary.failed, summary.new) == (40, 0, 40)
    assert (seen.done, seen.results) == (0, [False] * 40)
    check(tmp_path / "out", LINES)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["settings"]["rule"] == "attnlrp"
    assert manifest["provenance"]["model"] == "fake"
    assert manifest["provenance"]["versions"]["lxt"] == "2.1"
    assert manifest["versions"]["reltrace"] == reltrace.__version__
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_a_second_run_does_nothing(batch: Batch, server: FakeServer, tmp_path: Path) -> None:
    batch(LINES)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    seen = Seen()
    summary = batch(LINES, progress=seen)
    assert (summary.traced, summary.new, seen.done) == (40, 0, 40)
    assert server.jobs_submitted() == 40
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_failures_are_in_their_file(batch: Batch, server: FakeServer, tmp_path: Path) -> None:
    server.faults = lambda spec: [("prompt", "is not nice")] if "7" in spec.prompt else []
    summary = batch(LINES)
    bad = {index for index, line in enumerate(LINES) if "7" in line}
    assert (summary.traced, summary.failed) == (40 - len(bad), len(bad))
    check(tmp_path / "out", LINES, without=bad)
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    errors = {row["index"]: row for row in map(json.loads, lines)}
    assert set(errors) == bad
    assert errors[7] == {
        "index": 7,
        "line": 8,
        "id": 7,
        "error": "InvalidArgument",
        "message": "prompt: is not nice",
        "violations": [{"field": "prompt", "description": "is not nice"}],
    }


def test_a_folder_that_is_not_allowed_fails_no_prompt(batch: Batch, server: FakeServer) -> None:
    """
    Given a folder for tensors that the server does not allow
    I expect the batch to end and say so, and to go on once it is allowed.
    """
    folder = "s3://bucket/elsewhere"
    server.faults = lambda spec: [("output_uri", "is in no folder allowed here")]
    with pytest.raises(reltrace.InvalidArgument, match="output_uri: is in no folder allowed here"):
        batch(LINES, output_uri=folder, format="parquet")
    server.faults = lambda spec: []
    summary = batch(LINES, output_uri=folder, format="parquet")
    assert (summary.traced, summary.failed) == (40, 0)


def test_what_failed_for_a_fault_of_its_own_is_tried_again_when_asked(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    server.faults = lambda spec: [("prompt", "no")] if spec.prompt == LINES[3] else []
    assert batch(LINES).failed == 1
    server.faults = lambda spec: []
    assert batch(LINES).failed == 1
    summary = batch(LINES, retry_failed=True)
    assert (summary.traced, summary.failed, summary.new) == (40, 0, 1)
    check(tmp_path / "out", LINES)
    assert (tmp_path / "out" / "errors.jsonl").read_text() == ""


def test_what_failed_for_another_reason_is_tried_again(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    def broken(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        state = types_pb2.JOB_STATE_FAILED
        return [failed_chunk(job_id, state, code_pb2.INTERNAL, "a broken kernel")]

    server.run = broken
    assert batch(LINES).failed == 40
    server.run = None
    assert batch(LINES).traced == 40
    check(tmp_path / "out", LINES)


def test_of_several_failures_the_last_one_counts(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    def broken(spec: types_pb2.JobSpec, job_id: str) -> list[types_pb2.ResultChunk]:
        state, reason = types_pb2.JOB_STATE_FAILED, f"try {job_id}"
        return [failed_chunk(job_id, state, code_pb2.INTERNAL, reason)]

    server.run = broken
    for _ in range(2):
        assert batch(LINES[:3]).failed == 3
    errors = reltrace.load_batch(tmp_path / "out").errors
    assert [error.message for error in errors] == ["try s1-0", "try s1-1", "try s1-2"]
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["message"] for line in lines) == [
        "try s1-0",
        "try s1-1",
        "try s1-2",
    ]


def test_lines_that_are_no_prompts_are_noted_once(batch: Batch, tmp_path: Path) -> None:
    lines = ['"a"', "{", '"b"', '{"id": "q", "color": 1}']
    for retry in (False, True):
        summary = batch(lines, input_format="jsonl", retry_failed=retry)
        assert (summary.traced, summary.failed) == (2, 2)
    loaded = reltrace.load_batch(tmp_path / "out")
    assert [(error.index, error.id, error.line) for error in loaded.errors] == [
        (1, 1, 2),
        (3, "q", 4),
    ]


def test_thousands_of_lines_that_are_no_prompts(batch: Batch) -> None:
    """Nothing of them is on its way to the server, which must not stop the reader."""
    summary = batch(["{"] * 5000, input_format="jsonl", max_in_flight=4)
    assert (summary.traced, summary.failed) == (0, 5000)


def test_ids_and_several_targets(batch: Batch, tmp_path: Path) -> None:
    lines = [
        '{"id": "one", "prompt": "a b"}',
        '{"id": "two", "prompt": "c", "target": ["x", {"token": 5, "logprob": true}]}',
        '{"id": "one", "prompt": "d"}',
    ]
    for part_format in ("safetensors", "parquet"):
        batch(lines, out=part_format, input_format="jsonl", format=part_format)
        loaded = reltrace.load_batch(tmp_path / part_format)
        assert [trace.id for trace in loaded] == ["one", "two", "two", "one"]
        assert [trace.target.token for trace in loaded][1:3] == ["x", "dogs"]
        assert [trace.target.logprob for trace in loaded] == [False, False, True, False]
    one, other = (list(reltrace.load_batch(tmp_path / x)) for x in ("safetensors", "parquet"))
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.relevance, second.relevance)
        assert (first.target, first.provenance, first.tokens) == (
            second.target, second.provenance, second.tokens,
        )  # fmt: skip


def test_lines_that_the_folder_can_not_hold_fail_alone(batch: Batch, tmp_path: Path) -> None:
    own = {"rule": "lrp", "reduce": "full", "model": "other", "dtype": "float16", "sites": "embed"}
    lines = [json.dumps({"prompt": LINES[0]})]
    lines += [json.dumps({"prompt": LINES[0], name: value}) for name, value in own.items()]
    lines += [json.dumps({"prompt": LINES[0], "rule": "attnlrp", "sites": "resid"})]
    for part_format, failing in (("safetensors", 3), ("parquet", 5)):
        given = {"input_format": "jsonl", "format": part_format, "model": "fake"}
        for _ in range(2):
            summary = batch(lines, out=part_format, **given)
            assert (summary.traced, summary.failed) == (7 - failing, failing)
        loaded = reltrace.load_batch(tmp_path / part_format)
        assert (("embed",) in {trace.sites for trace in loaded}) == (part_format == "safetensors")
        fields = [error.violations[0]["field"] for error in loaded.errors]
        assert fields == list(own)[:failing]
        assert loaded.errors[0].error == "InvalidArgument"
        assert loaded.errors[0].message == (
            "rule: is 'lrp' for this prompt, and the folder holds traces with rule 'attnlrp' only; "
            "leave it out, or trace the prompt into another folder"
        )


def test_an_own_model_that_is_not_the_folders_fails_alone(batch: Batch, tmp_path: Path) -> None:
    """Where the batch names none: only the trace tells whether it is the one that is served."""
    lines = [json.dumps({"prompt": line}) for line in LINES[:3]]
    lines += [json.dumps({"prompt": LINES[3], "model": name}) for name in ("fake", "other")]
    assert batch(lines[:1], input_format="jsonl").traced == 1
    for _ in range(2):
        summary = batch(lines, input_format="jsonl")
        assert (summary.traced, summary.failed) == (4, 1)
    (error,) = reltrace.load_batch(tmp_path / "out").errors
    assert (error.index, error.line, error.error) == (4, 5, "InvalidArgument")
    assert "model: this prompt names another: the server's model is 'other'" in error.message


def test_lone_surrogates_fail_alone(batch: Batch, tmp_path: Path) -> None:
    lines = [
        '"one"',
        r'{"id": "\ud83d", "prompt": "two"}',
        r'{"\ud83d": 1, "prompt": "three"}',
        r'{"id": "\ud83d", "prompt": ""}',
    ]
    for part_format in ("safetensors", "parquet"):
        for _ in range(2):
            summary = batch(lines, out=part_format, input_format="jsonl", format=part_format)
            assert (summary.traced, summary.failed) == (1, 3)
        messages = [error.message for error in reltrace.load_batch(tmp_path / part_format).errors]
        surrogate = r"id: character 0 is a lone surrogate ('\ud83d'), which no UTF-8 text holds"
        assert (messages[0], messages[2]) == (surrogate, surrogate)
        assert messages[1].startswith("\ud83d: is not an argument of trace()")
        rows = (tmp_path / part_format / "errors.jsonl").read_text().splitlines()
        assert [json.loads(row)["message"] for row in rows] == messages


def test_other_settings_are_refused(batch: Batch) -> None:
    batch(LINES)
    with pytest.raises(reltrace.InvalidArgument) as refused:
        batch(LINES, target="dogs", dtype="bfloat16")
    assert "target was 'max' and is 'dogs'; dtype was 'float32' and is 'bfloat16'" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["other", *LINES[1:]], "differs from what this batch was begun with"),
        (LINES[:30], "has 30 prompts; this batch has read 40"),
    ],
)
def test_another_input_is_refused(
    batch: Batch, server: FakeServer, lines: list[str], message: str
) -> None:
    batch(LINES)
    with pytest.raises(reltrace.InvalidArgument, match=message):
        batch(lines)
    assert server.jobs_submitted() == 40


def test_prompts_may_be_added(batch: Batch, tmp_path: Path) -> None:
    batch(LINES[:25])
    assert batch(LINES).new == 15
    check(tmp_path / "out", LINES)


def test_a_limit_can_be_raised(batch: Batch, tmp_path: Path) -> None:
    assert batch(LINES, limit=10).traced == 10
    assert batch(LINES, limit=30).new == 20
    assert batch(LINES).new == 10
    check(tmp_path / "out", LINES)


def test_machines_share_a_folder(batch: Batch, server: FakeServer, tmp_path: Path) -> None:
    for number in (2, 1, 3):
        batch(LINES, shard=(number, 3), part_traces=4)
    assert server.jobs_submitted() == 40
    check(tmp_path / "out", LINES)
    with pytest.raises(reltrace.InvalidArgument, match="shards was 3 and is 4"):
        batch(LINES, shard=(1, 4))


def test_standard_input_is_copied_so_that_a_batch_can_go_on(batch: Batch, tmp_path: Path) -> None:
    data = "".join(line + "\n" for line in LINES).encode()
    batch(data, limit=15)
    assert (tmp_path / "out" / "stdin").read_bytes() == data
    assert batch(data).new == 25
    check(tmp_path / "out", LINES)
    with pytest.raises(reltrace.InvalidArgument, match="differs from what"):
        batch(data.replace(b"prompt 3", b"prompt 4"))


def test_another_model_is_not_mixed_in(batch: Batch, server: FakeServer, tmp_path: Path) -> None:
    batch(LINES, limit=10)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    manifest["provenance"]["revision"] = "r0"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(reltrace.TraceError, match=r"revision is 'r1', and this batch was .* 'r0'"):
        batch(LINES)
    assert len(reltrace.load_batch(tmp_path / "out")) == 10


def test_a_folder_of_something_else(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(reltrace.InvalidArgument, match=r"holds 'thesis.tex' and no batch"):
        batch(LINES)


def test_one_process_at_a_time(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(reltrace.TraceError, match="another `reltrace batch` writes to"):
            batch(LINES)
    assert batch(LINES).traced == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "magic"}, "rule: 'magic' is not served; fake has attnlrp"),
        ({"sites": ["resid", "moon"]}, "site: 'moon' is not served; fake has embed, resid"),
        ({"reduce": "half"}, "reduce: 'half' is not served"),
        ({"model": "gpt"}, "model: 'gpt' is not served; served: fake"),
        ({"layers": [4]}, "layer: 4 is not one of the 4 of fake"),
    ],
)
def test_what_is_not_served_fails_at_once(
    batch: Batch, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(reltrace.TraceError, match=message):
        batch(LINES, **settings)
    assert not (tmp_path / "out").exists()


def test_a_server_that_goes_away_leaves_what_has_come(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    def third_is_refused(spec: types_pb2.JobSpec) -> None:
        if spec.prompt == LINES[20]:
            server.stream_errors.extend([status_with(grpc.StatusCode.PERMISSION_DENIED, "no")] * 9)
            server.drop_at = {server.sent + 1}

    server.hold = third_is_refused
    with pytest.raises(reltrace.PermissionDenied):
        batch(LINES)
    assert len(reltrace.load_batch(tmp_path / "out")) == 20
    server.hold = lambda spec: None
    server.stream_errors.clear()
    assert batch(LINES).traced == 40
    check(tmp_path / "out", LINES)
