"""A process whose wall clock can be set: ``python -m chaos.clock FILE MODULE OPTIONS``.

Runs a module with a `time.time` that is ahead of the machine's by what `FILE` says at that moment.
Nothing else of the process is touched.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import threading
import time
from pathlib import Path

_OFFSET = struct.Struct("d")


class Clock:
    """The file of such a process: how far its clock is ahead, and how far it has been read to be.

    Parameters
    ----------
    path
        The file; made if missing, else continued.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(2 * _OFFSET.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 2 * _OFFSET.size)

    @property
    def ahead(self) -> float:
        """Seconds."""
        return float(_OFFSET.unpack_from(self._memory, 0)[0])

    @ahead.setter
    def ahead(self, seconds: float) -> None:
        _OFFSET.pack_into(self._memory, 0, seconds)

    @property
    def read(self) -> float:
        """What `ahead` was when the process last asked for the time."""
        return float(_OFFSET.unpack_from(self._memory, _OFFSET.size)[0])

    def now(self) -> float:
        """Return the time of the clock, as the process sees it."""
        ahead = self.ahead
        _OFFSET.pack_into(self._memory, _OFFSET.size, ahead)
        return _machine() + ahead


_machine = time.time


def _ask() -> None:
    while True:
        time.time()
        time.sleep(0.05)


def main() -> None:
    _, path, module, *options = sys.argv
    time.time = Clock(Path(path)).now
    # A process may not ask for the time for long: that its clock jumps is seen anyway.
    threading.Thread(target=_ask, name="clock", daemon=True).start()
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
