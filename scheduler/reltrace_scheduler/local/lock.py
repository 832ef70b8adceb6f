"""Locks a folder for one process at a time."""

import asyncio
import fcntl
import time
from pathlib import Path
from typing import IO

from reltrace_scheduler.errors import StartError


async def lock_folder(folder: Path, name: str, busy: str, patience: float = 0.0) -> IO[str]:
    """Make the folder of `--data` if need be, and lock a file in it.

    The folder is locked until the file and all copies of its descriptor are closed. Raises
    StartError with the message `busy` if another process holds it for longer than `patience`
    seconds.
    """
    try:
        # Prompts are in it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / name).open("a")
    except OSError as error:
        raise StartError(f"--data {folder}: {error.strerror}") from error
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise StartError(busy) from None
        else:
            return lock
        await asyncio.sleep(0.1)
