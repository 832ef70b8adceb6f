"""The jobs that wait for a pass, and the tasks that take many passes and have begun."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from reltrace_proto.v1 import types_pb2, worker_pb2

from reltrace_worker.engine.atlas import Atlas
from reltrace_worker.engine.generation import DECODE_STEPS, Generation
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.watchdog import LIMIT
from reltrace_worker.types.jobs import GenerateJob, Job, Target, TraceJob
from reltrace_worker.types.results import JobResult, Outcome

PASS_SECONDS = 1.0
"""About how long a pass of traces takes at most, unless it is one target or `LEAST_WORK`: so long
do others wait. Every pass reads all weights: shorter ones are slower per token."""

LEAST_WORK = 512
"""Tokens times how often they go through the model, such as 256 tokens of traces of one target. A
pass may hold so much however long it takes: the first of a kind, whose speed is not known, and on a
busy machine, where passes would shrink to single jobs and slow down further by that."""

_HANDICAPS = {types_pb2.PRIORITY_BATCH: 5.0}
"""Seconds by which a job that came earlier lets an interactive one go first: not for ever."""

_PATIENCE, _LEAST_LIMIT = 10.0, 60.0
"""A step may take so many times the predicted time of its whole pass, and at least these seconds:
long prompts are slower per token, and other programs may take the processor."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A leased job that can go into a pass, or the part of one that a pass has room for."""

    key: LeaseKey
    lease: worker_pb2.Lease
    # Without the targets that other passes have traced, or will trace.
    job: Job
    # Monotonic time by which the jobs that wait are ordered.
    order: float
    # The targets that are left for later passes.
    left: tuple[Target, ...] = ()
    # The results of the passes before, and the seconds that these took.
    parts: tuple[JobResult, ...] = ()
    seconds: float = 0.0
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

    A pass has at most `max_tokens` tokens; a longer prompt is a pass of its own. A pass of traces
    takes about `pass_seconds`: of a job with many targets it has a part, and the job waits for
    its next one behind the others.
    """

    def __init__(self, max_tokens: int, pass_seconds: float = PASS_SECONDS) -> None:
        self._max_tokens = max_tokens
        self.pass_seconds = pass_seconds
        # Held while the jobs of a task are changed.
        self.lock = threading.Lock()
        # Rows for which the last batch had room.
        self.capacity = max_tokens
        # Work per second of the passes of each batch key.
        self._speeds: dict[tuple[str, str], float] = {}
        self._waiting: deque[QueuedJob] = deque()
        # The jobs of the pass that is under way, without those that were dropped meanwhile.
        self._running: set[LeaseKey] = set()
        self._tasks: deque[RunningTask] = deque()
        self._task_is_next = False

    def __bool__(self) -> bool:
        return bool(self._waiting or self._tasks)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def add(self, jobs: Sequence[QueuedJob]) -> None:
        with self.lock:
            self._add(jobs)

    def _add(self, jobs: Sequence[QueuedJob]) -> None:
        self._waiting = deque(sorted([*self._waiting, *jobs], key=lambda job: job.order))

    def drop(self, keys: Collection[LeaseKey]) -> None:
        """Forget jobs that wait, and cancel those that have begun."""
        with self.lock:
            self._waiting = deque(job for job in self._waiting if job.key not in keys)
            self._running.difference_update(keys)
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
            waiting = (job for job in self._waiting if job.job.batch_key not in begun)
            first = next(waiting, None)
            if first is None:
                return []
            self.capacity = self._max_tokens
            if not isinstance(first.job, TraceJob):
                # Others join it, where it is a generation.
                self._waiting.remove(first)
                return [first]
            speed = self._speeds.get(first.job.batch_key, 0.0)
            work = max(LEAST_WORK, speed * self.pass_seconds)
            room = self.capacity = int(min(self.capacity, work / first.job.passes))
            batch: list[QueuedJob] = []
            left: deque[QueuedJob] = deque()
            for job in self._waiting:
                part = _part(job, first, room)
                if part is None:
                    left.append(job)
                else:
                    batch.append(part)
                    room -= part.job.rows
            self._waiting = left
            self._running = {job.key for job in batch}
        return batch

    def end_pass(
        self,
        batch: Sequence[QueuedJob],
        outcomes: Sequence[Outcome],
        seconds: float,
        join: Callable[[Sequence[JobResult]], JobResult],
    ) -> tuple[list[tuple[QueuedJob, Outcome]], list[QueuedJob]]:
        """Learn from a pass of traces that took so long; let jobs with targets left wait again.

        Return the jobs that have ended, with the results of all their passes joined, and of the
        others what the pass has done.
        """
        done = [_done(job, outcome) for job, outcome in zip(batch, outcomes, strict=True)]
        self.measured(done, seconds)
        ended: list[tuple[QueuedJob, Outcome]] = []
        others: list[QueuedJob] = []
        again: list[QueuedJob] = []
        for index, (job, outcome) in enumerate(zip(done, outcomes, strict=True)):
            if not isinstance(outcome, JobResult):
                ended.append((job, outcome))
                continue
            parts = (*job.parts, outcome)
            if not job.left:
                ended.append((job, join(parts) if job.parts else outcome))
                continue
            assert isinstance(job.job, TraceJob)
            others.append(job)
            rest = replace(job.job, targets=job.left)
            # The first had all of the pass that it could use: now it is the others' turn.
            order = job.order if index else queue_order(job.lease)
            spent = job.seconds + seconds
            again.append(QueuedJob(job.key, job.lease, rest, order, (), parts, spent))
        with self.lock:
            self._add([job for job in again if job.key in self._running])
            self._running = set()
        return ended, others

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
            if speed > self._speeds.get(key, 0.0) or seconds > self.pass_seconds:
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


def queue_order(lease: worker_pb2.Lease) -> float:
    """Return the time by which a job that begins to wait now is ordered."""
    return time.monotonic() + _HANDICAPS.get(lease.priority, 0.0)


def _part(queued: QueuedJob, first: QueuedJob, room: int) -> QueuedJob | None:
    """Return what a pass that has so many rows left takes of a job: all, some targets, or None."""
    job, begins = queued.job, queued is first
    if not isinstance(job, TraceJob) or job.batch_key != first.job.batch_key:
        return None
    if not begins and (job.alone or (isinstance(first.job, TraceJob) and first.job.alone)):
        return None
    count = len(job.targets)
    if job.sites and not job.alone:
        # However long a prompt is: the first has one target traced.
        count = min(count, max(room // job.total_tokens, int(begins)))
    part = job.with_targets(job.targets[:count])
    if not count or (part.rows > room and not begins):
        return None
    return replace(queued, job=part, left=job.targets[count:])


def _done(queued: QueuedJob, outcome: Outcome) -> QueuedJob:
    """Return what a pass has done of a job: it may have stopped early."""
    job = queued.job
    if not isinstance(outcome, JobResult) or not isinstance(job, TraceJob):
        return queued
    count = len(outcome.targets)
    left = (*job.targets[count:], *queued.left)
    return replace(queued, job=job.with_targets(job.targets[:count]), left=left)


def _work(batch: Sequence[QueuedJob]) -> int:
    return sum(job.job.rows * job.job.passes for job in batch)
