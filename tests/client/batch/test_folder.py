"""The folder of a batch that several machines enter at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import reltrace
from batch.conftest import SETTINGS
from make_trace import make_trace
from reltrace.batch import folder
from reltrace.batch.folder import BatchFolder, ProvenanceMismatch, read_manifest
from reltrace.storage.atomic_files import replace_file

MACHINES = 2
SHARED = replace(SETTINGS, shards=MACHINES)
# Seconds that a writer of a manifest waits for a second one, which must not come.
WAIT = 0.5


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the manifests that two machines were about to write at a time."""
    together = threading.Barrier(MACHINES)
    found: list[Path] = []

    @contextmanager
    def write(path: Path) -> Iterator[BinaryIO]:
        try:
            together.wait(WAIT)
            found.append(path)
        except threading.BrokenBarrierError:
            together.reset()
        with replace_file(path) as file:
            yield file

    monkeypatch.setattr(folder, "replace_file", write)
    return found


def at_once(root: Path, work: Callable[[BatchFolder], None]) -> list[BaseException | None]:
    """Do something on all machines; return what came of it."""
    start = threading.Barrier(MACHINES)

    def machine(number: int) -> None:
        own = BatchFolder(root, (number, MACHINES))
        with own.lock():
            start.wait(20)
            work(own)

    with ThreadPoolExecutor(MACHINES) as pool:
        running = [pool.submit(machine, number) for number in range(1, MACHINES + 1)]
    return [one.exception() for one in running]


def test_machines_that_enter_together(tmp_path: Path, met: list[Path]) -> None:
    assert at_once(tmp_path, lambda own: own.open(SHARED, "in.jsonl")) == [None, None]
    assert met == []
    assert read_manifest(tmp_path)["settings"]["shards"] == MACHINES


def test_of_machines_with_other_settings_one_enters(tmp_path: Path, met: list[Path]) -> None:
    def enter(own: BatchFolder) -> None:
        own.open(replace(SHARED, target=own.path.name), "in.jsonl")

    one, other = sorted(at_once(tmp_path, enter), key=lambda error: error is not None)
    assert one is None
    assert isinstance(other, reltrace.InvalidArgument)
    assert "holds a batch with other settings (target was " in str(other)
    assert met == []


@pytest.mark.parametrize("revisions", [("r1", "r1"), ("r1", "r2")])
def test_machines_whose_first_traces_come_together(
    tmp_path: Path, met: list[Path], revisions: tuple[str, str]
) -> None:
    BatchFolder(tmp_path, (1, MACHINES)).path.mkdir()
    BatchFolder(tmp_path, (1, MACHINES)).open(SHARED, "in.jsonl")

    def first_trace(own: BatchFolder) -> None:
        revision = revisions[own.path.name == "shard-2-of-2"]
        own.check_provenance(replace(make_trace().provenance, revision=revision))

    errors = [error for error in at_once(tmp_path, first_trace) if error is not None]
    assert [type(error) for error in errors] == [ProvenanceMismatch] * (len(set(revisions)) - 1)
    assert met == []
    assert read_manifest(tmp_path)["provenance"]["revision"] in revisions


def test_a_manifest_that_is_held_for_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_MANIFEST_TIMEOUT", 0.05)
    whole, part = BatchFolder(tmp_path, (1, 1)), BatchFolder(tmp_path, (1, 2))
    with (
        whole.lock(),
        part.lock(),
        pytest.raises(reltrace.TraceError, match="another `reltrace batch` writes to"),
    ):
        part.open(SHARED, "in.jsonl")
