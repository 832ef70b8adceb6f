"""Finds work on a thread that stands still: a pass, a tokenizer or an upload that never ends.

A thread that hangs can not be ended, so the worker ends. The time of a step is counted by a clock
that stands still while this process does: a machine that slept is no reason to end.
"""

import asyncio
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from reltrace_proto.v1 import worker_pb2

from reltrace_worker.types.errors import DeviceLostError

log = structlog.get_logger()

LIMIT = 600.0
"""Seconds that a step may take whose time is not known beforehand: the first passes, a long prompt
that is tokenized, a tensor that is stored."""

_PERIOD = 1.0
_LOOP_LIMIT = 60.0
"""Seconds after which the event loop, on which we look, is taken to stand still itself."""


@dataclass(slots=True, eq=False)
class Work:
    """What a thread does at present for some jobs, in steps of at most `limit` seconds.

    `tokens` are those of each job, where they are known.
    """

    name: str
    leases: Sequence[worker_pb2.Lease]
    limit: float
    tokens: Sequence[int] = ()
    steps: int = 0
    # Seconds since the last of them.
    silent: float = 0.0
    _silent_since_step: int = 0

    def step(self) -> None:
        """Note that the work goes on."""
        self.steps += 1

    def wait(self, seconds: float) -> None:
        """Note that so much time has passed."""
        if self.steps != self._silent_since_step:
            self._silent_since_step, self.silent = self.steps, 0.0
        else:
            self.silent += seconds

    def describe(self) -> str:
        return (
            f"the {self.name} thread has stood still for {self.silent:.0f} s; "
            f"a step may take {self.limit:.0f} s"
        )


class Watchdog:
    """Knows what the threads of a worker do, and for how long each has stood still."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: list[Work] = []
        self._here = threading.local()
        self._looked = 0.0
        # What was under way when the device was lost.
        self._lost: Work | None = None

    @contextmanager
    def watching(
        self,
        name: str,
        leases: Sequence[worker_pb2.Lease],
        limit: float = LIMIT,
        tokens: Sequence[int] = (),
    ) -> Iterator[Work]:
        """Watch what this thread does until the block ends."""
        work = Work(name, leases, limit, tokens)
        with self._lock:
            self._works.append(work)
        self._here.work = work
        try:
            yield work
        except DeviceLostError as error:
            self.lose(str(error))
            raise
        finally:
            with self._lock:
                self._works.remove(work)

    def step(self) -> None:
        """Note that the work that this thread began last goes on."""
        self._here.work.step()

    def lose(self, reason: str) -> None:
        """Note that nothing can be computed any more, in what is under way or after it."""
        with self._lock:
            if self._lost is None:
                log.critical("device.lost", reason=reason)
                engines = [work for work in self._works if work.name == "engine"]
                self._lost = engines[0] if engines else Work("engine", (), 0.0)

    async def stuck(self) -> Work:
        """Wait until a step takes too long, or the device is lost; return the work concerned.

        It is in the log then.
        """
        while True:
            await asyncio.sleep(_PERIOD)
            work = self._look(time.monotonic())
            if self._lost is not None:
                return self._lost
            if work is not None and work.silent > work.limit:
                _report(work)
                return work

    def slowest(self) -> Work | None:
        """Return the work that has taken the largest part of its limit without a step."""
        with self._lock:
            return max(self._works, key=lambda work: work.silent / work.limit, default=None)

    def silent(self) -> float:
        """Return the seconds since the slowest work last took a step; 0: there is none."""
        work = self.slowest()
        return 0.0 if work is None else work.silent

    def fault(self) -> str:
        """Return why this worker is to be ended by its supervisor; empty: it is well."""
        age = time.monotonic() - self._looked
        if self._looked and age > _LOOP_LIMIT:
            return f"the event loop has stood still for {age:.0f} s"
        work = self.slowest()
        return work.describe() if work is not None and work.silent > work.limit else ""

    def _look(self, now: float) -> Work | None:
        passed = min(now - self._looked, 2 * _PERIOD) if self._looked else 0.0
        self._looked = now
        with self._lock:
            for work in self._works:
                work.wait(passed)
        return self.slowest()


def _report(work: Work) -> None:
    """Log what hangs: the jobs by their ids and sizes, and where every thread is."""
    jobs = [
        f"{lease.job_id} attempt={lease.attempt} tenant={lease.tenant} model={lease.spec.model}"
        + (f" tokens={tokens}" if tokens is not None else "")
        for lease, tokens in itertools.zip_longest(work.leases, work.tokens)
    ]
    log.critical(
        "worker.hangs",
        thread=work.name,
        silent=round(work.silent),
        limit=round(work.limit),
        steps=work.steps,
        jobs=jobs,
        stack=_stacks(),
    )


def _stacks() -> str:
    frames = sys._current_frames()
    return "\n".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.ident in frames
    )
