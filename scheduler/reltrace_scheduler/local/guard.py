"""Ties a child process to the life of its parent, however the parent ends.

On Linux the program below asks the kernel for a signal when its parent dies (prctl(2),
PR_SET_PDEATHSIG), which stays in force across the exec that follows. Elsewhere it only execs: a
child then outlives a parent that was killed with SIGKILL.

Usage: guard.py PARENT_PID SIGNAL PROGRAM ARGUMENT...
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def guarded(command: Sequence[str], number: signal.Signals) -> list[str]:
    """Return a command that runs `command` and gets a signal when this process ends."""
    # By path and without site-packages: it starts in a few milliseconds.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(number)), *command]


def main() -> None:
    parent, number, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
        # The parent may have died before the request was in place.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
