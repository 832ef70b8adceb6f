"""What `reltrace up` starts its parts through; run by path, as a program.

On Linux it asks the kernel to kill this process when its parent dies (prctl(2),
PR_SET_PDEATHSIG), which stays in force across the exec that follows. Elsewhere it only execs: a
part then outlives a `reltrace up` that was killed with SIGKILL.

Usage: child.py PARENT_PID PROGRAM ARGUMENT...
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
        # The parent may have died before the request was in place.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(program[0], program)
