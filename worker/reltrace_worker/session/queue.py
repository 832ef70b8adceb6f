"""The jobs that wait for a pass, and the tasks that take many passes and have begun."""

import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from reltrace_proto.v1 import worker_pb2

from reltrace_worker.engine.atlas import Atlas
from reltrace_worker.engine.generation import DECODE_STEPS, Generation
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.watchdog import LIMIT
from reltrace_worker.types.jobs import GenerateJob, Job, TraceJob
from reltrace_worker.types.results import Outcome

PASS_SECONDS = 2.0
"""About how long a pass of traces takes at most, unless it is one job or `LEAST_WORK`: so long do
others wait. Every pass reads all weights: shorter ones are slower per token."""

LEAST_WORK = 512
"""Tokens times how often they go through the model, such as 256 tokens of traces of one target. A
pass may hold so much however long it takes: the first of a kind, whose speed is not known, and on a
busy machine, where passes would shrink to single jobs and slow down further by that."""

_PATIENCE, _LEAST_LIMIT = 10.0, 60.0
"""A step may take so many times the predicted time of its whole pass, and at least these seconds:
long prompts are slower per token, and other programs may take the processor."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A leased job that can go into a pass."""

    key: LeaseKey
    lease: worker_pb2.Lease
    job: Job
    # Monotonic time by which the jobs that wait are ordered.
    order: float
    # Seconds that the task had taken when the job joined it.
    joined: float = 0.0


@dataclass(slots=True, eq=False)
class RunningTask:
    """A task of many passes that has begun, and its jobs that have not ended, by their index."""

    jobs: dict[int, QueuedJob]
    task: Generation | Atlas
    batch_key: tuple[str, str]
    # As in `JobRunner`: of those that have joined last.
    full_pass_jobs: int
    seconds: float = 0.0
    # Steps that are left of its turn.
    steps: int = DECODE_STEPS


class RequestQueue:
    """Shared by the event loop, which adds and drops jobs, and the engine's thread, which takes.

    A pass has at most `max_tokens` tokens; a longer prompt is a pass of its own.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        # Held while the jobs of a task are changed.
        self.lock = threading.Lock()
        # Tokens for which the last batch had room.
        self.capacity = max_tokens
        # Work per second of the passes of each batch key.
        self._speeds: dict[tuple[str, str], float] = {}
        self._waiting: deque[QueuedJob] = deque()
        self._tasks: deque[RunningTask] = deque()
        self._task_is_next = False

    def __bool__(self) -> bool:
        return bool(self._waiting or self._tasks)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def add(self, jobs: Sequence[QueuedJob]) -> None:
        with self.lock:
            self._waiting = deque(sorted([*self._waiting, *jobs], key=lambda job: job.order))

    def drop(self, keys: Collection[LeaseKey]) -> None:
        """Forget jobs that wait, and cancel those that have begun."""
        with self.lock:
            self._waiting = deque(job for job in self._waiting if job.key not in keys)
            for running in self._tasks:
                for index, job in list(running.jobs.items()):
                    if job.key in keys:
                        running.task.cancel(index)
                        del running.jobs[index]

    def take_back(self) -> list[LeaseKey]:
        """Give up all jobs that wait; return their leases."""
        with self.lock:
            keys = [job.key for job in self._waiting]
            self._waiting.clear()
        return keys

    def next_batch(self) -> list[QueuedJob]:
        """Take the jobs of one pass: the first that waits, and what may share its pass and fits.

        What is passed over stays in order, and comes first before long.
        """
        with self.lock:
            # Of tasks one of each batch key at a time: it holds memory meanwhile.
            begun = {running.batch_key for running in self._tasks}
            jobs = (job.job for job in self._waiting)
            first = next((job for job in jobs if job.batch_key not in begun), None)
            if first is None:
                return []
            if not isinstance(first, TraceJob):
                # Others join it, where it is a generation.
                job = next(job for job in self._waiting if job.job is first)
                self._waiting.remove(job)
                self.capacity = self._max_tokens
                return [job]
            speed = self._speeds.get(first.batch_key, 0.0)
            work = max(LEAST_WORK, speed * PASS_SECONDS)
            budget = _BatchBudget(self._max_tokens, work)
            batch: list[QueuedJob] = []
            left: deque[QueuedJob] = deque()
            for job in self._waiting:
                takes = job.job.batch_key == first.batch_key and budget.take(job.job)
                (batch if takes else left).append(job)
            self._waiting = left
            self.capacity = budget.capacity
        return batch

    def limit(self, batch: Sequence[QueuedJob]) -> float:
        """Return how many seconds a pass may take before its thread is taken to hang.

        Each of its steps may, so that a machine that has become slow ends no pass.
        """
        speed = self._speeds.get(batch[0].job.batch_key)
        return LIMIT if speed is None else max(_LEAST_LIMIT, _PATIENCE * _work(batch) / speed)

    def measured(self, batch: Sequence[QueuedJob], seconds: float) -> None:
        """Learn the speed of passes from one that took so long."""
        speed, key = _work(batch) / max(seconds, 1e-6), batch[0].job.batch_key
        with self.lock:
            # A short pass is slower per token, which says nothing of a full one.
            if speed > self._speeds.get(key, 0.0) or seconds > PASS_SECONDS:
                self._speeds[key] = speed

    def next_task(self) -> RunningTask | None:
        """Return a task that has begun, where no job waits or it is a task's turn."""
        with self.lock:
            if not self._tasks or (self._waiting and not self._task_is_next):
                self._task_is_next = bool(self._tasks)
                return None
            self._task_is_next = False
            # It stays in the queue: its jobs may be dropped while it runs.
            running = self._tasks[0]
            self._tasks.rotate(-1)
            return running

    def begin(self, running: RunningTask) -> None:
        with self.lock:
            self._tasks.append(running)

    def join(self, running: RunningTask, task: Generation) -> list[QueuedJob]:
        """Let jobs that wait join a generation, as many as it has room for; return them."""
        joined: list[QueuedJob] = []
        left: deque[QueuedJob] = deque()
        with self.lock:
            full = False
            for job in self._waiting:
                number = None
                # Nobody passes one that is to join first.
                if isinstance(job.job, GenerateJob) and not full:
                    number = task.join(job.job)
                    full = number is None
                if number is None:
                    left.append(job)
                else:
                    running.jobs[number] = replace(job, joined=running.seconds)
                    joined.append(job)
            self._waiting = left
            running.full_pass_jobs = len(running.jobs) if full else 0
        return joined

    def go_on(self, running: RunningTask, steps: int) -> None:
        """Note that a task took so many steps; the rest of its turn comes next."""
        with self.lock:
            running.steps -= steps
            if running.steps <= 0:
                running.steps = DECODE_STEPS
            else:
                self._tasks.remove(running)
                self._tasks.appendleft(running)
                self._task_is_next = True

    def end(
        self, running: RunningTask, outcomes: Mapping[int, Outcome], *, finished: bool
    ) -> list[tuple[QueuedJob, Outcome]]:
        """Take out the jobs that have ended, and the task itself if it is finished.

        Jobs that were dropped meanwhile are left out.
        """
        with self.lock:
            jobs = running.jobs
            ended = [(jobs.pop(index), outcomes[index]) for index in outcomes if index in jobs]
            if finished:
                self._tasks.remove(running)
        return ended


def _work(batch: Sequence[QueuedJob]) -> int:
    jobs = [job.job for job in batch]
    return sum(job.total_tokens for job in jobs) * max(job.passes for job in jobs)


class _BatchBudget:
    """What else fits into a pass: of so many tokens, and of so much work (see `LEAST_WORK`)."""

    def __init__(self, tokens: int, work: float) -> None:
        self._tokens, self._work = tokens, work
        self._jobs = self._sum = self._passes = 0

    @property
    def capacity(self) -> int:
        """Tokens that there was room for, in such a pass as it has become."""
        return int(min(self._tokens, self._work / max(1, self._passes)))

    def take(self, job: Job) -> bool:
        """Tell whether a job fits into the pass, and count it if it does."""
        passes, needed = max(self._passes, job.passes), self._sum + job.total_tokens
        if self._jobs and (needed > self._tokens or needed * passes > self._work):
            return False
        self._jobs, self._sum, self._passes = self._jobs + 1, needed, passes
        return True
