"""Changes of a folder that are there whole or not at all, whatever the moment of a crash."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from reltrace.types.errors import TraceError, invalid

# What a crash leaves unfinished has this ending, and is removed by the next run.
UNFINISHED = ".unfinished"
# A lock that is waited for with an end in sight has to be looked at: flock knows none.
_LOOK_AGAIN = 0.02


@contextmanager
def held(
    folder: Path,
    lock_name: str,
    field: str,
    busy: str,
    *,
    mode: int = 0o777,
    patience: float = 0.0,
) -> Iterator[None]:
    """Hold a folder, which is made if need be: one process at a time.

    Parameters
    ----------
    folder : Path
        The folder.
    lock_name : str
        Of the file in it that is locked.
    field : str
        Names the folder in errors.
    busy : str
        What is said if another process holds it.
    mode : int
        Of the folder, if it is made.
    patience : float
        Seconds to wait for another process, for what is soon over.

    Raises
    ------
    InvalidArgument
        Naming `field`, if the folder can not be used.
    TraceError
        Saying `busy`, if another process holds it.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        lock = (folder / lock_name).open("a")
    except OSError as error:
        raise invalid(field, f"{folder} can not be used: {error.strerror}") from None
    with lock:
        end = time.monotonic() + patience
        while not _locked(lock):
            if time.monotonic() >= end:
                raise TraceError(busy)
            time.sleep(_LOOK_AGAIN)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in an error of the system that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            # Not the system's own words, but those of a library about them.
            raise OSError(f"{error}: {str(path)!r}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file in one step: readers see the old one or the new one, and so does a crash."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with named(unfinished), unfinished.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    finish(unfinished, path)


def finish(unfinished: Path, path: Path) -> None:
    """Give a file that is complete and synced its name, durably."""
    unfinished.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_durably(path: Path, line: bytes) -> None:
    """Append to a file; a crash may leave a part of `line`, which has no end of line."""
    with named(path), path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def cut(path: Path, size: int) -> None:
    """Cut a file off after `size` bytes, durably."""
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())
