"""What a client has seen, in a file that outlives it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Lines of JSON, each written by one call so that SIGKILL leaves at most one torn.

    Parameters
    ----------
    path
        The file; made if missing, else continued.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.truncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)

    def write(self, **line: Any) -> None:
        """Write a line, with the time as `at`."""
        line["at"] = round(time.time(), 3)
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        return read(self._path)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal, also of one that is being written."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                # Clients of an older commit noted no time.
                yield {"at": 1.0, **json.loads(line)}
