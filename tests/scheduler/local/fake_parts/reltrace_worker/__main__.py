"""Stands in for a worker of `reltrace up`; the model's name says how it behaves."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

EVENTS = Path(os.environ["EVENTS"])
model = sys.argv[sys.argv.index("--model") + 1]


def note(event: str) -> None:
    with EVENTS.open("a") as file:
        file.write(f"worker {event} {os.getpid()} {model}\n")


if model == "crash":
    print("loading", flush=True)
    raise RuntimeError("the model is on fire")
if model == "missing":
    sys.exit("reltrace-worker: there is no folder 'missing'")
if model == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (note("stop"), os._exit(0)))
note("start")
print("arguments", sys.argv[1:], flush=True)
while True:
    signal.pause()
