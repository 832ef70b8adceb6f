"""Batches that are broken off, disks that are full, and what waits to be written."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reltrace
from batch.written import LINES, Batch, check, content
from fake_server import FakeServer
from reltrace.batch import parts, writer
from reltrace.batch.journal import Failed, Journal
from waiting import wait_until


class Crash(BaseException):
    """Stands for SIGKILL: the process changes no file any more."""


# How SQLite makes a commit atomic is tested in test_journal.py.
CALLS = [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (Journal, "commit")]


def crash_at(number: int, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> list[int]:
    """Crash at the n-th change of the folder, just before or just after it."""
    calls = [0]

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            # A process that was killed changes nothing any more.
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
        assert left - parts == {".lock", "manifest.json", "journal.sqlite", "errors.jsonl"}
        assert len((tmp_path / out / "errors.jsonl").read_text().splitlines()) == 1
    assert number > 12


def test_a_journal_that_is_damaged_is_an_error(batch: Batch, tmp_path: Path) -> None:
    batch(LINES)
    journal = tmp_path / "out" / "journal.sqlite"
    journal.write_bytes(b"nonsense" * 999)
    with pytest.raises(reltrace.InvalidArgument, match=r"journal.sqlite is damaged: file is not a"):
        batch(LINES)
    with pytest.raises(reltrace.InvalidArgument, match="is damaged"):
        reltrace.load_batch(tmp_path / "out")


def test_a_full_disk_ends_the_run(
    batch: Batch, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reltrace.batch.writer.parts.write_part", full)
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
    assert f"'{full.with_suffix('')}'" in str(raised.value)
    assert "\n" not in str(raised.value)
    full.unlink(missing_ok=True)
    assert batch(LINES, format=part_format).traced == 40


def test_what_describes_the_traces_fills_a_part_too(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a small limit of the header of a file, and a prompt whose traces exceed it
    I expect files below the limit, and this prompt to fail alone.
    """
    monkeypatch.setattr(parts, "MAX_HEADER_BYTES", 20_000)
    monkeypatch.setattr(writer, "_COMMIT_BYTES", 20_000)
    lines = [json.dumps({"prompt": line}) for line in LINES]
    lines[7] = json.dumps({"prompt": LINES[7], "target": ["x"] * 60})
    for _ in range(2):
        summary = batch(lines, input_format="jsonl")
        assert (summary.traced, summary.failed) == (39, 1)
    check(tmp_path / "out", LINES, without={7})
    (error,) = reltrace.load_batch(tmp_path / "out").errors
    assert re.fullmatch(
        r"target: the tokens and ids of its 60 traces take \d+ bytes; a safetensors file has room "
        "for 20000 in its header: trace fewer targets of it, or use --format parquet",
        error.message,
    )
    files = sorted((tmp_path / "out").glob("part-*"))
    assert len(files) > 1
    for path in files:
        assert header_bytes_of(path) < 20_000
    assert max(map(header_bytes_of, files)) > 10_000
    summary = batch(lines, out="parquet", input_format="jsonl", format="parquet")
    assert (summary.traced, summary.failed) == (40, 0)


def header_bytes_of(path: Path) -> int:
    """Return the size of the header of a safetensors file."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_failures_that_wait_have_a_bound(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_QUEUE_BYTES", 20_000)
    waiting = []
    put = writer.Writer.put

    def watched(self: writer.Writer, result: writer.Traced | Failed) -> None:
        put(self, result)
        waiting.append((self._queue_bytes, len(self._queue)))

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
    journal = tmp_path / "out" / "journal.sqlite"
    try:
        wait_until(journal.exists, "the journal", 20)
        wait_until(lambda: len(reltrace.load_batch(tmp_path / "out")), "the first commit", 20)
        assert running.is_alive()
    finally:
        release.set()
        running.join(20)
    check(tmp_path / "out", LINES)
