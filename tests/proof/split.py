"""Is an atlas the same whoever makes it? Let three workers make it, and compare."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import reltrace
from proof.planted import AT_THE_END
from safetensors.numpy import load_file

LOOK = 0.1
"""Seconds between two looks at who works."""


@dataclass(frozen=True, slots=True)
class Split:
    """What three workers made of a corpus.

    Attributes
    ----------
    workers : int
        That took part.
    arrays, of : int
        Of the atlas: those that have the bits of one worker's, and all.
    megabytes : float
        What they hold.
    """

    workers: int
    arrays: int
    of: int
    megabytes: float


def split(address: str, texts: list[str], one: Path, out: Path, progress: bool) -> Split:
    """Make the atlas again, by all workers of another service, and compare it with `one`."""
    busy: set[str] = set()
    over = threading.Event()

    def look() -> None:
        with reltrace.Client(address) as watching:
            while not over.wait(LOOK):
                busy.update(worker.id for worker in watching.admin.workers() if worker.leased)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with reltrace.Client(address) as client:
            client.build_atlas(texts, out, target=AT_THE_END, progress=progress)
    finally:
        over.set()
        watcher.join()
    first, second = (load_file(folder / "atlas.safetensors") for folder in (one, out))
    assert first.keys() == second.keys()
    same = sum(first[name].tobytes() == second[name].tobytes() for name in first)
    return Split(len(busy), same, len(first), sum(a.nbytes for a in first.values()) / 1e6)
