"""The real worker, whose first pass never ends if a file is not there yet, and is then.

python -m chaos.hanging_worker FILE OPTIONS-OF-THE-WORKER
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from reltrace_worker.__main__ import main
from reltrace_worker.engine import Engine
from reltrace_worker.session import queue
from reltrace_worker.types.jobs import TraceJob

_LIMIT = 4.0
"""Seconds within which it finds that out."""


def _blocked_kernel(_: Engine, jobs: Sequence[TraceJob]) -> None:
    print(f"hangs with {len(jobs)} jobs", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    if not file.exists():
        file.touch()
        queue.LIMIT = _LIMIT
        Engine.run = _blocked_kernel  # type: ignore[assignment]
    main()
