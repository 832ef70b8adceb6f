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
import time
from collections import deque
from collections.abc import Sequence

import structlog
from chaos import standin
from reltrace_proto.net import Credentials
from reltrace_proto.v1 import worker_pb2
from reltrace_worker.session.leases import Chunks, LeaseKey
from reltrace_worker.session.session import Session

_DRAIN_GRACE = 10.0


class StandInRunner:
    """Runs `standin.Work`, a few jobs a pass, on a thread as the real engine does."""

    def __init__(self, jobs_per_pass: int) -> None:
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

    def store_large(self, url: str, above: int) -> None:
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
        await asyncio.to_thread(_run, works)
        return [standin.chunks(work, lease) for work, lease in zip(works, batch, strict=True)]


def _run(works: list[standin.Work]) -> None:
    for work in works:
        if work.milliseconds:
            print(f"runs {work.number}", flush=True)
    if any(work.deadly for work in works):
        os.kill(os.getpid(), signal.SIGKILL)
    # Not a wait for anything: this is how long the pass takes.
    time.sleep(max(work.milliseconds for work in works) / 1000)


def _key(lease: worker_pb2.Lease) -> LeaseKey:
    return LeaseKey(lease.job_id, lease.attempt)


async def _work(server: str, token: str, name: str, version: str, jobs_per_pass: int) -> None:
    # A worker's id names one process: a lease of the one that was killed is not ours.
    worker_id = f"{name}.{os.getpid()}"
    hello = worker_pb2.Hello(
        worker_id=worker_id, model=standin.MODEL, device="none", version=version
    )
    credentials = Credentials(token)
    session = Session(server, hello, StandInRunner(jobs_per_pass), credentials=credentials)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, session.asked_to_drain.set)
    working = asyncio.create_task(session.run())
    stopping = asyncio.create_task(session.asked_to_drain.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        await session.drain(_DRAIN_GRACE)
        await asyncio.wait({working}, timeout=5.0)
    if working.done():
        working.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--token", default="")
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", default="0")
    parser.add_argument("--jobs-per-pass", type=int, default=16)
    given = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(_work(given.server, given.token, given.name, given.version, given.jobs_per_pass))


if __name__ == "__main__":
    main()
