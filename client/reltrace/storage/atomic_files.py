"""Files that a crash leaves either as they were or complete, and folders with one writer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from reltrace.types.errors import TraceError, invalid

UNFINISHED = ".unfinished"
"""Suffix of a file that is being written; the next run removes or replaces what a crash left."""

LOCK = ".lock"
_POLL_SECONDS = 0.02


@contextmanager
def lock_folder(folder: Path, busy: str, *, timeout: float = 0.0) -> Iterator[None]:
    """Create an output folder if need be, and keep other processes from locking it.

    Raises InvalidArgument if the folder can not be used, and TraceError, saying `busy`, if another
    process holds the lock for `timeout` seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise invalid("out", f"{folder} can not be used: {error.strerror}") from None
    with lock:
        deadline = time.monotonic() + timeout
        while not _try_lock(lock):
            if time.monotonic() >= deadline:
                raise TraceError(busy)
            time.sleep(_POLL_SECONDS)
        yield


def check_no_other_files(folder: Path, kind: str, *ours: str) -> None:
    """Check that a folder holds nothing but `ours`, its lock and what a crash left unfinished.

    Raises InvalidArgument, which names one of the other files and the `kind` that is missing.
    """
    names = {entry.name for entry in folder.iterdir()} - {LOCK, *ours}
    others = [name for name in names if not name.endswith(UNFINISHED)]
    if others:
        raise invalid("out", f"{folder} holds {min(others)!r} and no {kind}; choose a new folder")


def _try_lock(lock: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:
        raise TraceError(
            f"{lock.name}: writing such a folder needs POSIX file locks (Linux, macOS), which this "
            "system does not have; reading one does not"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_writable(path: Path, field: str) -> None:
    """Raise InvalidArgument if a file can not be written to `path`, before work is done for it."""
    if not path.parent.is_dir():
        raise invalid(field, f"there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise invalid(field, f"{str(path)!r} is a folder; name a file")
    target, replaced = _target(path)
    if not os.access(target.parent if replaced else target, os.W_OK):
        raise invalid(field, f"{str(path)!r} can not be written: permission denied")


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Name the file in an OSError that names none or a temporary one, such as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # The message of a library, not of the operating system.
            raise OSError(f"{error}: {str(path)!r}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replace_file(
    path: Path, *, durable: bool = True, unfinished: Path | None = None
) -> Iterator[BinaryIO]:
    """Open a new version of a file, which replaces the file in one step at the end.

    Readers, and a crash, find the old version or the new one, which is on the disk then if
    `durable`; after an error only the old one is left. `unfinished` is its temporary name in the
    same folder, by default with the suffix `UNFINISHED`. Of a symbolic link the file is replaced
    that it leads to; a device or a pipe is written to. Raises OSError, naming `path`.
    """
    target, replaced = _target(path)
    if not replaced:
        with with_filename(path), target.open("wb") as file:
            yield file
        return
    unfinished = unfinished or target.with_name(target.name + UNFINISHED)
    with with_filename(path):
        try:
            with unfinished.open("wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            unfinished.replace(target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        if durable:
            _sync_folder(target.parent)


def _target(path: Path) -> tuple[Path, bool]:
    """Return where a path leads to, and whether that is replaced: a device or a pipe is not."""
    target = Path(os.path.realpath(path))
    return target, target.is_file() or not target.exists()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
