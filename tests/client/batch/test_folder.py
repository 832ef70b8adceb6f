"""The folder of a batch that several machines enter at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import reltrace
from batch.conftest import SETTINGS
from make_trace import make_trace
from reltrace.batch import folder
from reltrace.batch.folder import Folder, OtherOrigin, read_manifest
from reltrace.storage import atomic_files as disk

MACHINES = 2
SHARED = replace(SETTINGS, shards=MACHINES)
# Seconds that one who writes a manifest waits for another, who must not come.
WAIT = 0.5


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the manifests that two machines were about to write at a time."""
    together = threading.Barrier(MACHINES)
    found: list[Path] = []

    def write(path: Path, pieces: Iterable[bytes]) -> None:
        try:
            together.wait(WAIT)
            found.append(path)
        except threading.BrokenBarrierError:
            together.reset()
        disk.write_whole(path, pieces)

    monkeypatch.setattr(folder, "write_whole", write)
    return found


def at_once(root: Path, work: Callable[[Folder], None]) -> list[BaseException | None]:
    """Do something on all machines; return what came of it."""
    start = threading.Barrier(MACHINES)

    def machine(number: int) -> None:
        own = Folder.of(root, (number, MACHINES))
        with own.held():
            start.wait(20)
            work(own)

    with ThreadPoolExecutor(MACHINES) as pool:
        running = [pool.submit(machine, number) for number in range(1, MACHINES + 1)]
    return [one.exception() for one in running]


def test_machines_that_enter_together(tmp_path: Path, met: list[Path]) -> None:
    assert at_once(tmp_path, lambda own: own.enter(SHARED, "in.jsonl")) == [None, None]
    assert met == []
    assert read_manifest(tmp_path)["settings"]["shards"] == MACHINES


def test_of_machines_with_other_settings_one_enters(tmp_path: Path, met: list[Path]) -> None:
    def enter(own: Folder) -> None:
        own.enter(replace(SHARED, target=own.own.name), "in.jsonl")

    one, other = sorted(at_once(tmp_path, enter), key=lambda error: error is not None)
    assert one is None
    assert isinstance(other, reltrace.InvalidArgument)
    assert "holds a batch with other settings (target was " in str(other)
    assert met == []


@pytest.mark.parametrize("revisions", [("r1", "r1"), ("r1", "r2")])
def test_machines_whose_first_traces_come_together(
    tmp_path: Path, met: list[Path], revisions: tuple[str, str]
) -> None:
    Folder.of(tmp_path, (1, MACHINES)).own.mkdir()
    Folder.of(tmp_path, (1, MACHINES)).enter(SHARED, "in.jsonl")

    def first_trace(own: Folder) -> None:
        revision = revisions[own.own.name == "shard-2-of-2"]
        own.check_origin(replace(make_trace().provenance, revision=revision))

    errors = [error for error in at_once(tmp_path, first_trace) if error is not None]
    assert [type(error) for error in errors] == [OtherOrigin] * (len(set(revisions)) - 1)
    assert met == []
    assert read_manifest(tmp_path)["provenance"]["revision"] in revisions


def test_a_manifest_that_is_held_for_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_PATIENCE", 0.05)
    whole, part = Folder.of(tmp_path, (1, 1)), Folder.of(tmp_path, (1, 2))
    with (
        whole.held(),
        part.held(),
        pytest.raises(reltrace.TraceError, match="another `reltrace batch` writes to"),
    ):
        part.enter(SHARED, "in.jsonl")


@pytest.mark.parametrize(
    "write", [disk.append_durably, lambda path, line: disk.write_whole(path, [line])]
)
def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, write: Callable[[Path, bytes], None]
) -> None:
    for name in ("journal.jsonl", "journal.jsonl.unfinished"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/journal\.jsonl"):
        write(tmp_path / "journal.jsonl", b"{}\n")
