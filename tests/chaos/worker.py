"""A worker process without a model: the real session over an engine that knows its results.

python -m chaos.worker --server ADDRESS --name NAME
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import structlog
from chaos import standin
from reltrace_proto.net import Credentials
from reltrace_proto.v1 import worker_pb2
from reltrace_worker.session.leases import Chunks, LeaseKey
from reltrace_worker.session.lifecycle import work
from reltrace_worker.session.session import Session
from reltrace_worker.session.watchdog import Watchdog

_DRAIN_GRACE = 10.0
_LIMIT = 3.0
"""Seconds that a pass may take, beside twice those that its jobs ask for."""


class StandInRunner:
    """Runs `standin.Work`, a few jobs a pass, on a thread as the real engine does."""

    def __init__(self, jobs_per_pass: int, watchdog: Watchdog, hang: Path | None) -> None:
        self._watchdog = watchdog
        self._hang = hang
        self._jobs_per_pass = jobs_per_pass
        self._ready: deque[worker_pb2.Lease] = deque()
        self._arrived = asyncio.Event()
        self._full_pass_jobs = 0

    async def add(self, leases: Sequence[worker_pb2.Lease]) -> list[Chunks]:
        self._ready.extend(leases)
        self._arrived.set()
        return []

    def drop(self, keys: set[LeaseKey]) -> None:
        self._ready = deque(lease for lease in self._ready if _key(lease) not in keys)

    def full_pass_jobs(self) -> int:
        return self._full_pass_jobs

    def store_large(self, *settings: object) -> None:
        """Send all results, however large."""

    def take_back(self) -> list[LeaseKey]:
        keys = [_key(lease) for lease in self._ready]
        self._ready.clear()
        return keys

    async def next_results(self) -> list[Chunks]:
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()
        batch = [self._ready.popleft() for _ in range(min(len(self._ready), self._jobs_per_pass))]
        self._full_pass_jobs = len(batch) if self._ready else 0
        works = [standin.Work.of(lease.spec) for lease in batch]
        await asyncio.to_thread(self._run, batch, works)
        return [standin.chunks(one, lease) for one, lease in zip(works, batch, strict=True)]

    def _run(self, batch: Sequence[worker_pb2.Lease], works: Sequence[standin.Work]) -> None:
        for one in works:
            if one.milliseconds or one.endless:
                print(f"runs {one.number}", flush=True)
        if any(one.deadly for one in works):
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = max(one.milliseconds for one in works) / 1000
        with self._watchdog.watching("engine", batch, _LIMIT + 2 * seconds):
            if any(one.endless for one in works) or self._told_to_hang():
                threading.Event().wait()
            # Not a wait for anything: this is how long the pass takes.
            time.sleep(seconds)

    def _told_to_hang(self) -> bool:
        """Take the file away by which this process is told to hang, so that the next one is not."""
        try:
            if self._hang is not None:
                self._hang.unlink()
                return True
        except FileNotFoundError:
            pass
        return False


def _key(lease: worker_pb2.Lease) -> LeaseKey:
    return LeaseKey(lease.job_id, lease.attempt)


async def _work(given: argparse.Namespace) -> None:
    # A worker's id names one process: a lease of the one that was killed is not ours.
    worker_id = f"{given.name}.{os.getpid()}"
    hello = worker_pb2.Hello(
        worker_id=worker_id, model=standin.MODEL, device="none", version=given.version
    )
    watchdog = Watchdog()
    runner = StandInRunner(given.jobs_per_pass, watchdog, given.hang)
    session = Session(
        given.server, hello, runner, credentials=Credentials(given.token), watchdog=watchdog
    )
    await work(session, watchdog, _DRAIN_GRACE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--token", default="")
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", default="0")
    parser.add_argument("--jobs-per-pass", type=int, default=16)
    parser.add_argument("--hang", type=Path, help="a pass that finds this file never ends")
    given = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(_work(given))


if __name__ == "__main__":
    main()
