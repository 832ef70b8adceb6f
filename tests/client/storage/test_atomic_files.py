"""Files that are replaced in one step, and folders that are locked."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import reltrace
from reltrace.storage.atomic_files import lock_folder, replace_file


@pytest.mark.parametrize("durable", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    path, unfinished = tmp_path / "a", tmp_path / "a.unfinished"
    with replace_file(path, durable=durable) as file:
        file.write(b"old")
    # It has the permissions of any new file.
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    (tmp_path / "new").unlink()
    for size in (1, 1 << 20):
        unfinished.symlink_to("/dev/full")
        with (
            pytest.raises(OSError, match="No space left on device") as caught,
            replace_file(path, durable=durable) as file,
        ):
            file.write(bytes(size))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    """
    Given a symbolic link in place of a file, and a pipe
    I expect the file to be replaced that the link leads to, and the pipe to be written to.
    """
    link, real, pipe = tmp_path / "link", tmp_path / "folder" / "real", tmp_path / "pipe"
    real.parent.mkdir()
    link.symlink_to(real)
    for content in (b"old", b"new"):
        with replace_file(link) as file:
            file.write(content)
        assert link.is_symlink()
        assert real.read_bytes() == content
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replace_file(pipe) as file:
        file.write(b"data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert pipe.is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "folder", "pipe"}
    assert list(real.parent.iterdir()) == [real]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replace_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_system_without_posix_locks_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (
        pytest.raises(reltrace.TraceError, match=r"needs POSIX file locks \(Linux, macOS\)"),
        lock_folder(tmp_path, "busy"),
    ):
        pass
