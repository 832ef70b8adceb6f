"""Whose turn it is: jobs that wait for a pass, and work that takes many passes."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from reltrace_worker.engine.atlas import Atlas
from reltrace_worker.engine.generation import Generation
from reltrace_worker.session.encoding import Ready
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import AtlasJob, GenerateJob, Job, TraceJob
from reltrace_worker.types.results import JobResult

Outcome = JobResult | EngineError

PASS_SECONDS = 2.0
"""About how long a pass of traces takes at most, unless it is one job or `_LEAST_WORK`: so long do
others wait. Every pass reads all weights: shorter ones are slower per token."""

_LEAST_WORK = 512
"""Tokens times how often they go through the model, such as 256 tokens of traces of one target. A
pass may hold so much however long it takes: the first of a kind, whose speed is not known, and on a
busy machine, where passes would shrink to single jobs and slow down further by that."""


@dataclass(slots=True, eq=False)
class HalfDone:
    """What takes many passes: texts that are written together, or the atlas of a corpus."""

    batch: dict[int, Ready]
    """By their number in the work: those that have not ended."""
    work: Generation | Atlas
    kind: tuple[str, str]
    crowded: int
    """How many jobs there were, if they left others behind."""
    seconds: float = 0.0
    charged: float = 0.0
    """Of the seconds: those that jobs which have ended were charged with."""


class Turns:
    """The jobs that wait and the work that is half done.

    Shared by the loop, which adds and drops, and the engine's thread, which takes.

    Parameters
    ----------
    max_tokens : int
        Most tokens in one pass; a longer prompt is a pass of its own.

    Attributes
    ----------
    lock : Lock
        Held while a batch is changed.
    room : int
        Tokens for which the last batch had room.
    running : frozenset of LeaseKey
        Leases in the pass that is under way, and in what is half done.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.lock = threading.Lock()
        self.room = max_tokens
        # Work per second of the passes of each kind.
        self._speeds: dict[tuple[str, str], float] = {}
        self._ready: deque[Ready] = deque()
        self._half_done: deque[HalfDone] = deque()
        self._half_done_is_next = False
        self.running: frozenset[LeaseKey] = frozenset()

    def __bool__(self) -> bool:
        return bool(self._ready or self._half_done)

    @property
    def left_behind(self) -> bool:
        """Jobs wait for a pass."""
        return bool(self._ready)

    def add(self, jobs: Sequence[Ready]) -> None:
        """Let jobs wait, in the order of their turns."""
        with self.lock:
            self._ready = deque(sorted([*self._ready, *jobs], key=lambda job: job.turn))

    def drop(self, keys: Collection[LeaseKey]) -> None:
        """Forget jobs, and go on no more with those that are half done."""
        with self.lock:
            self._ready = deque(job for job in self._ready if job.key not in keys)
            for half_done in self._half_done:
                for number, job in list(half_done.batch.items()):
                    if job.key in keys:
                        half_done.work.cancel(number)
                        del half_done.batch[number]

    def take_back(self) -> list[LeaseKey]:
        """Give up all jobs that wait; return their leases."""
        with self.lock:
            keys = [job.key for job in self._ready]
            self._ready.clear()
        return keys

    def next_batch(self) -> list[Ready]:
        """Take what goes into one pass: the job whose turn it is, and what goes with it.

        That is, in the order of their turns, what is of its kind (another would be another pass)
        and still fits. What is passed over stays in order, and comes first before long.
        """
        with self.lock:
            # Of what takes many passes one of each kind at a time: it holds memory meanwhile.
            begun = {half_done.kind for half_done in self._half_done}
            jobs = (job.job for job in self._ready)
            first = next((job for job in jobs if job.batch_key not in begun), None)
            if first is None:
                return []
            batch: list[Ready] = []
            left: deque[Ready] = deque()
            work = math.inf
            if isinstance(first, TraceJob):
                speed = self._speeds.get(first.batch_key, 0.0)
                work = max(_LEAST_WORK, speed * PASS_SECONDS)
            room = _Room(self._max_tokens, work)
            for job in self._ready:
                if job.job.batch_key == first.batch_key and room.takes(job.job):
                    batch.append(job)
                else:
                    left.append(job)
            self._ready = left
            self.room = room.tokens
            self._note_running(batch)
        return batch

    def passed(self, batch: Sequence[Ready] = (), seconds: float = 0.0) -> None:
        """Note that a pass is over; of a batch that was traced, how long it took."""
        with self.lock:
            self._note_running()
            if not batch:
                return
            jobs = [job.job for job in batch]
            work = sum(job.total_tokens for job in jobs) * max(_passes(job) for job in jobs)
            speed, kind = work / max(seconds, 1e-6), jobs[0].batch_key
            # A short pass is slower per token, which says nothing of a full one.
            if speed > self._speeds.get(kind, 0.0) or seconds > PASS_SECONDS:
                self._speeds[kind] = speed

    def next_half_done(self) -> HalfDone | None:
        """Return what is half done, where nothing is ready or it is its turn."""
        with self.lock:
            if not self._half_done or (self._ready and not self._half_done_is_next):
                self._half_done_is_next = bool(self._half_done)
                return None
            self._half_done_is_next = False
            # Among them still: jobs are dropped in mid-turn too.
            found = self._half_done[0]
            self._half_done.rotate(-1)
            self._note_running()
            return found

    def begun(self, half_done: HalfDone) -> None:
        """Add what takes many passes."""
        with self.lock:
            self._half_done.append(half_done)
            self._note_running()

    def ended(
        self, half_done: HalfDone, ended: Mapping[int, Outcome], *, over: bool
    ) -> list[tuple[Ready, Outcome]]:
        """Take out the jobs that have ended, and the work itself if it is over.

        Returns
        -------
        list of (Ready, Outcome)
            Without what was dropped meanwhile.
        """
        with self.lock:
            batch = half_done.batch
            jobs = [(batch.pop(number), ended[number]) for number in ended if number in batch]
            if over:
                self._half_done.remove(half_done)
            self._note_running()
        return jobs

    def _note_running(self, batch: Sequence[Ready] = ()) -> None:
        half_done = [job for one in self._half_done for job in one.batch.values()]
        self.running = frozenset(job.key for job in [*batch, *half_done])


def _passes(job: Job) -> int:
    """Return how many times a job's tokens go through the model: forward, and once per target."""
    return job.passes


class _Room:
    """What else fits into a pass.

    Parameters
    ----------
    tokens : int
        Of a pass; a longer prompt is a pass of its own.
    work : float
        Of a pass of traces: tokens times how often they go through the model.
    """

    def __init__(self, tokens: int, work: float) -> None:
        self._tokens, self._work = tokens, work
        self._jobs = self._sum = self._longest = self._passes = 0

    @property
    def tokens(self) -> int:
        """Tokens that there was room for, in such a pass as it has become."""
        return int(min(self._tokens, self._work / max(1, self._passes)))

    def takes(self, job: Job) -> bool:
        """Tell whether a job fits into the pass, and count it if it does."""
        longest, passes = max(self._longest, job.total_tokens), max(self._passes, _passes(job))
        # Texts are padded to the longest of them; an atlas is made alone.
        padded = isinstance(job, GenerateJob)
        needed = (self._jobs + 1) * longest if padded else self._sum + job.total_tokens
        fits = needed <= self._tokens and needed * passes <= self._work
        if self._jobs and (not fits or isinstance(job, AtlasJob)):
            return False
        self._jobs, self._sum = self._jobs + 1, self._sum + job.total_tokens
        self._longest, self._passes = longest, passes
        return True
