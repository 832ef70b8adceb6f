"""Batches against a server that misbehaves as told."""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import reltrace
from batch.conftest import Seen
from fake_results import failed_chunk, relevance_of
from fake_server import FakeServer, status_with
from google.rpc import code_pb2
from reltrace._batch import parts, writer
from reltrace._batch.journal import Failed
from reltrace._batch.run import Summary
from reltrace_proto.v1 import types_pb2
from waiting import wait_until

Batch = Callable[..., Summary]

LINES = [f"prompt {number} {'x ' * (number % 3)}" for number in range(40)]


def check(folder: Path, lines: list[str], *, without: set[int] = frozenset()) -> None:
    """Check that every line has its trace once, in order, and with its own numbers."""
    loaded = reltrace.load_batch(folder)
    wanted = [index for index in range(len(lines)) if index not in without]
    assert [trace.id for trace in loaded] == wanted
    for trace in loaded:
        text = " ".join(["<s>", *lines[trace.id].split()])
        expected = relevance_of(text, "resid", trace.relevance.shape)
        np.testing.assert_array_equal(trace.relevance, expected)
    assert {failed.index for failed in loaded.errors} == without


def content(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (trace.id, trace.relevance.tobytes(), trace.tokens, trace.target)
        for trace in reltrace.load_batch(folder)
    ]


def test_every_prompt_has_its_trace(batch: Batch, tmp_path: Path) -> None:
    seen = Seen()
    summary = batch(LINES, watcher=seen, part_traces=7)
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
    summary = batch(LINES, watcher=seen)
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
    assert "model: this prompt has its own: the server's model is 'other'" in error.message


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


def test_standard_input_can_be_taken_up_again(batch: Batch, tmp_path: Path) -> None:
    data = "".join(line + "\n" for line in LINES).encode()
    batch(data, limit=15)
    assert batch(data).new == 25
    check(tmp_path / "out", LINES)
    with pytest.raises(reltrace.InvalidArgument, match="differs from what"):
        batch(data.replace(b"prompt 3", b"prompt 4"))


def test_another_model_is_not_mixed_in(batch: Batch, server: FakeServer, tmp_path: Path) -> None:
    batch(LINES, limit=10)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    manifest["provenance"]["revision"] = "r0"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(reltrace.TraceError, match=r"revision is 'r1'; this batch was .* 'r0'"):
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


class Crash(BaseException):
    """SIGKILL, as far as files can tell."""


CALLS = [(os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "unlink")]


def crash_at(number: int, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> list[int]:
    """Crash at the n-th change of the folder, just before or just after it."""
    calls = [0]

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            # Whoever is dead does nothing any more.
            if calls[0] > number or (before and calls[0] == number):
                raise Crash
            done = change(*args, **options)
            if calls[0] == number:
                raise Crash
            return done

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return calls


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
@pytest.mark.parametrize("before", [True, False])
def test_a_crash_at_any_moment_loses_nothing(
    batch: Batch, server: FakeServer, tmp_path: Path, before: bool, part_format: str
) -> None:
    """
    Given a run that crashes at the n-th change of its folder, for every n
    I expect the run after it to end with what an undisturbed run has.
    """
    lines = ["{", *(json.dumps(line) for line in LINES[:9])]
    given = {"input_format": "jsonl", "format": part_format, "part_traces": 4}
    batch(lines, out="undisturbed", **given)
    expected = content(tmp_path / "undisturbed")
    number, crashed = 0, True
    while crashed:
        number += 1
        out = f"out{number}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(number, monkeypatch, before=before)
            try:
                batch(lines, out=out, **given)
                crashed = False
            except Crash:
                pass
        summary = batch(lines, out=out, **given)
        assert (summary.traced, summary.failed) == (9, 1)
        assert content(tmp_path / out) == expected
        left = {path.name for path in (tmp_path / out).iterdir()}
        parts = {name for name in left if name.startswith("part-")}
        assert left - parts == {".lock", "manifest.json", "journal.jsonl", "errors.jsonl"}
        assert len((tmp_path / out / "errors.jsonl").read_text().splitlines()) == 1
    assert number > 12


@pytest.mark.parametrize("torn", [b'{"part": "part-000001.safe', b"{}", b"\x00\x00"])
def test_a_line_that_was_cut_off_is_removed(batch: Batch, tmp_path: Path, torn: bytes) -> None:
    batch(LINES, limit=20)
    with (tmp_path / "out" / "journal.jsonl").open("ab") as file:
        file.write(torn)
    assert len(reltrace.load_batch(tmp_path / "out")) == 20
    assert batch(LINES).new == 20
    check(tmp_path / "out", LINES)


def test_a_journal_that_is_damaged_is_an_error(batch: Batch, tmp_path: Path) -> None:
    batch(LINES)
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_bytes(b"nonsense\n" + journal.read_bytes())
    with pytest.raises(reltrace.InvalidArgument, match=r"journal.jsonl: line 1 is damaged"):
        batch(LINES)
    with pytest.raises(reltrace.InvalidArgument, match="line 1 is damaged"):
        reltrace.load_batch(tmp_path / "out")


def test_a_full_disk_ends_the_run(
    batch: Batch, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reltrace._batch.writer.parts.write", full)
    with pytest.raises(OSError, match="No space left"):
        batch(LINES * 20, part_traces=2)
    monkeypatch.undo()
    assert batch(LINES * 20).traced == 800


@pytest.mark.parametrize("part_format", ["safetensors", "parquet"])
def test_a_full_disk_is_told_with_the_file(batch: Batch, tmp_path: Path, part_format: str) -> None:
    full = tmp_path / "out" / f"part-000000.{part_format}.unfinished"
    full.parent.mkdir()
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as raised:
        batch(LINES, format=part_format)
    assert str(full) in str(raised.value)
    assert "\n" not in str(raised.value)
    full.unlink(missing_ok=True)
    assert batch(LINES, format=part_format).traced == 40


def test_what_describes_the_traces_fills_a_part_too(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a small limit of what the head of a file may hold, and a prompt whose traces pass it
    I expect files below the limit, and this prompt to fail alone.
    """
    monkeypatch.setattr(parts, "MOST_HEAD_BYTES", 20_000)
    lines = [json.dumps({"prompt": line}) for line in LINES]
    lines[7] = json.dumps({"prompt": LINES[7], "target": ["x"] * 60})
    for _ in range(2):
        summary = batch(lines, input_format="jsonl")
        assert (summary.traced, summary.failed) == (39, 1)
    check(tmp_path / "out", LINES, without={7})
    (error,) = reltrace.load_batch(tmp_path / "out").errors
    assert re.fullmatch(
        r"target: the tokens and ids of its 60 traces take \d+ bytes, and the head of a "
        "safetensors file at most 20000; trace fewer targets of it, or use --format parquet",
        error.message,
    )
    files = sorted((tmp_path / "out").glob("part-*"))
    assert len(files) > 1
    for path in files:
        assert head_of(path) < 20_000
    assert max(map(head_of, files)) > 10_000
    summary = batch(lines, out="parquet", input_format="jsonl", format="parquet")
    assert (summary.traced, summary.failed) == (40, 0)


def head_of(path: Path) -> int:
    """Return the size of the head of a safetensors file."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_failures_that_wait_have_a_bound(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_WAITING_BYTES", 20_000)
    waiting = []
    put = writer.Writer.put

    def watched(self: writer.Writer, result: writer.Traced | Failed) -> None:
        put(self, result)
        waiting.append((self._waiting_bytes, len(self._waiting)))

    monkeypatch.setattr(writer.Writer, "put", watched)
    assert batch(["{"] * 2000, input_format="jsonl").failed == 2000
    assert len(waiting) == 2000
    assert 0 < max(size for size, _ in waiting) <= 20_000
    assert max(count for _, count in waiting) < 20


def test_what_a_batch_does_not_write_is_left_alone(batch: Batch, tmp_path: Path) -> None:
    batch(LINES, limit=10)
    out = tmp_path / "out"
    theirs = ["part-notes.txt", "part-7.safetensors", "part-000099.txt", "thesis.tex.unfinished"]
    ours = [
        "part-000099.safetensors", "part-000098.parquet", "part-000097.safetensors.unfinished",
        "manifest.json.unfinished", "errors.jsonl.unfinished",
    ]  # fmt: skip
    for name in (*theirs, *ours):
        (out / name).touch()
    (out / "part-000096.safetensors").mkdir()
    batch(LINES)
    check(out, LINES)
    left = {path.name for path in out.iterdir()}
    assert left >= {*theirs, "part-000096.safetensors"}
    assert not left & set(ours)


def test_what_has_come_is_durable_after_some_seconds(
    batch: Batch, server: FakeServer, tmp_path: Path
) -> None:
    """
    Given a job that does not end, behind others that have
    I expect those on disk, while the run goes on.
    """
    release = threading.Event()
    server.hold = lambda spec: (
        None if spec.prompt != LINES[20] else release.wait(20)  # type: ignore[func-returns-value]
    )
    running = threading.Thread(target=batch, args=(LINES,), kwargs={"part_seconds": 0.1})
    running.start()
    journal = tmp_path / "out" / "journal.jsonl"
    try:
        # It is there for a moment before its first line is.
        wait_until(lambda: journal.exists() and journal.stat().st_size, "the first commit", 20)
        assert len(reltrace.load_batch(tmp_path / "out")) > 0
        assert running.is_alive()
    finally:
        release.set()
        running.join(20)
    check(tmp_path / "out", LINES)
