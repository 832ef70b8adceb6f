"""Jobs with many targets: traced in parts, so that others do not wait for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from reference.leases import lease, results
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine, preparing
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.queue import QueuedJob, RequestQueue
from reltrace_worker.session.runner import Runner
from reltrace_worker.types.jobs import Target, Term, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult, Outcome, ResolvedTarget


def queued(number: int, tokens: int, targets: int, *, packs: bool = True) -> QueuedJob:
    prompt = TokenizedPrompt((5,) * tokens, ("",) * tokens)
    asked = tuple(Target((Term(tokens - 1, token),)) for token in range(targets))
    job = TraceJob(prompt, asked, packs_targets=packs)
    return QueuedJob(LeaseKey(f"j-{number}", 1), worker_pb2.Lease(), job, float(number))


def traced(batch: Sequence[QueuedJob], most: int = 1000) -> list[JobResult]:
    """Return results of the targets that a pass has of its jobs."""
    return [
        JobResult(
            tuple(ResolvedTarget(target, 0, "", "", 0.0) for target in job.job.targets[:most])
        )
        for job in batch
        if isinstance(job.job, TraceJob)
    ]


def joined(parts: Sequence[JobResult]) -> JobResult:
    return JobResult(tuple(target for part in parts for target in part.targets))


def parts(batch: Sequence[QueuedJob]) -> list[tuple[str, int]]:
    return [
        (job.key.job_id, len(job.job.targets)) for job in batch if isinstance(job.job, TraceJob)
    ]


def traced_tokens(outcome: Outcome) -> list[int | None]:
    """Return the tokens of the targets of a result, in order."""
    assert isinstance(outcome, JobResult)
    return [target.target.terms[0].token_id for target in outcome.targets]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("reltrace_worker.session.queue.time.monotonic", lambda: now[0])
    return now


def test_many_targets_fill_passes_and_then_let_others_go_first(clock: list[float]) -> None:
    """
    Given jobs that wait, of which the second has more targets than a pass has room for
    I expect it to fill the first pass, to come first in the next one, and then to wait behind
    those that came before that pass had ended; and its result to have all targets, in order.
    """
    queue = RequestQueue(100)
    queue.add([queued(0, 20, 1), queued(1, 20, 14), queued(2, 20, 1)])
    ran, ended = [], {}
    while batch := queue.next_batch():
        ran.append(parts(batch))
        clock[0] += 1
        if len(ran) == 2:
            queue.add([replace(queued(3, 20, 1), order=clock[0])])
        clock[0] += 1
        found, others = queue.end_pass(batch, traced(batch), 0.5, joined)
        assert len(found) + len(others) == len(batch)
        ended |= {job.key.job_id: (job, outcome) for job, outcome in found}
    assert ran == [
        [("j-0", 1), ("j-1", 4)],
        [("j-1", 5)],
        [("j-2", 1), ("j-3", 1), ("j-1", 3)],
        [("j-1", 2)],
    ]
    assert set(ended) == {"j-0", "j-1", "j-2", "j-3"}
    job, outcome = ended["j-1"]
    assert traced_tokens(outcome) == list(range(14))
    # With the pass that ended it, it took four.
    assert job.seconds == 1.5


def test_a_part_takes_about_a_second(clock: list[float]) -> None:
    """
    Given passes of 400 tokens a second, forward and backward
    If a job has 32 targets of 40 tokens
    I expect passes of a second, but for the first, whose time is not known.
    """
    queue = RequestQueue(4096)
    queue.add([queued(0, 40, 32)])
    rows = []
    while batch := queue.next_batch():
        rows.append(sum(job.job.rows for job in batch))
        queue.end_pass(batch, traced(batch), rows[-1] / 400, joined)
    assert rows == [240, 400, 400, 240]


def test_a_long_prompt_is_a_pass_of_its_own_which_may_stop_early(clock: list[float]) -> None:
    """
    Given a long prompt with five targets, of which a pass has traced two when it is stopped
    I expect the speed of what it did, and the other three in a pass behind who waits meanwhile;
    the last target alone shares a pass.
    """
    queue = RequestQueue(4096)
    queue.add([queued(0, 300, 5, packs=False), queued(1, 20, 1)])
    first = queue.next_batch()
    assert parts(first) == [("j-0", 5)]
    assert queue.end_pass(first, traced(first, most=2), 9.0, joined)[0] == []
    # 100 tokens a second: three times 300 in nine seconds.
    assert queue.limit([queued(2, 6000, 1)]) == pytest.approx(10 * 2 * 6000 / 100)
    second = queue.next_batch()
    assert parts(second) == [("j-1", 1)]
    queue.end_pass(second, traced(second), 0.1, joined)
    third = queue.next_batch()
    assert parts(third) == [("j-0", 3)]
    queue.end_pass(third, traced(third, most=2), 9.0, joined)
    queue.add([queued(3, 20, 1)])
    last = queue.next_batch()
    assert parts(last) == [("j-3", 1)]
    queue.end_pass(last, traced(last), 0.01, joined)
    ((_, outcome),), _ = queue.end_pass(batch := queue.next_batch(), traced(batch), 6.0, joined)
    assert traced_tokens(outcome) == list(range(5))


@pytest.mark.parametrize("when", ["in its pass", "between passes"])
def test_a_job_that_is_dropped_does_not_go_on(clock: list[float], when: str) -> None:
    queue = RequestQueue(100)
    queue.add([queued(0, 20, 9)])
    batch = queue.next_batch()
    if when == "in its pass":
        queue.drop({LeaseKey("j-0", 1)})
    queue.end_pass(batch, traced(batch), 0.5, joined)
    if when == "between passes":
        queue.drop({LeaseKey("j-0", 1)})
    assert not queue
    assert queue.next_batch() == []


def test_a_job_with_targets_left_is_handed_back_between_passes(clock: list[float]) -> None:
    queue = RequestQueue(100)
    queue.add([queued(0, 20, 9)])
    batch = queue.next_batch()
    assert queue.take_back() == []
    queue.end_pass(batch, traced(batch), 0.5, joined)
    assert queue.take_back() == [LeaseKey("j-0", 1)]
    assert not queue


@pytest.fixture
def engine(checkpoints: Checkpoints) -> Engine:
    return Engine(checkpoints.loaded("plain"))


def targets(count: int) -> list[types_pb2.Target]:
    return [types_pb2.Target(token=types_pb2.TokenRef(id=token)) for token in range(count)]


class Counted:
    """The engine, with the tokens and the targets of all its batches noted; the first waits."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._run = engine._run_batch
        monkeypatch.setattr(engine, "_run_batch", self.run)

    def run(self, jobs: list[TraceJob], checkpointing: bool) -> list[Outcome]:
        self.begun.set()
        assert self.go_on.wait(20)
        self.batches.append([(job.total_tokens, len(job.targets)) for job in jobs])
        return self._run(jobs, checkpointing)


async def test_jobs_beside_many_targets_cost_what_they_cost_alone(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given 40 jobs of one target beside one of 32
    I expect one forward and one backward pass over each job's own rows, and no more; and the
    numbers of the job with 32 to be those of 32 jobs.
    """
    counted = Counted(engine, monkeypatch)
    counted.go_on.set()
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=4096)
    many = lease(40, 6, targets=targets(32))
    single = [lease(50 + n, 6, targets=[target]) for n, target in enumerate(targets(32))]
    await runner.add([*(lease(number, 6) for number in range(40)), many, *single])
    pieces: dict[str, list[types_pb2.TensorPiece]] = {}
    async with asyncio.timeout(30):
        while len(pieces) < 73:
            for chunks in await runner.next_results():
                (leased,) = chunks
                pieces[leased.chunk.job_id] = list(leased.chunk.tensors)
    assert [count for batch in counted.batches for _, count in batch] == [1] * (40 + 32 + 32)
    # 256 rows in the first pass, whose speed is not known.
    assert len(counted.batches) <= 1 + (40 + 32 + 32) * 6 // 252
    assert [piece.trace for piece in pieces["j-40"]] == list(range(32))
    for number, piece in enumerate(pieces["j-40"]):
        (alone,) = pieces[f"j-{50 + number}"]
        ours, wanted = (
            torch.frombuffer(bytearray(data), dtype=torch.float32)
            for data in (piece.data, alone.data)
        )
        assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "alone"])
async def test_an_interactive_job_waits_for_one_pass_of_many_targets(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    """
    Given a job of 64 targets whose first pass is under way
    If an interactive job comes
    I expect it in the next pass.
    """
    if not packs:
        monkeypatch.setitem(preparing.ROWS_PER_READING, "cpu", 0)
    counted = Counted(engine, monkeypatch)
    # A pass is over after the backward pass in which its time has passed: after each one.
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=48, pass_seconds=0.0)
    await runner.add([lease(0, 12, targets=targets(64))])
    assert await asyncio.to_thread(counted.begun.wait, 20)
    await runner.add([lease(1, 5)])
    counted.go_on.set()
    assert await results(runner) == ["j-1"]
    assert await results(runner) == ["j-0"]
    assert (5, 1) in counted.batches[1]
    tokens = sum(tokens * count for batch in counted.batches for tokens, count in batch)
    assert tokens == (5 + 64 * 12) if packs else tokens >= 5 + 64 * 12
    assert runner.stats.jobs == 2
    assert runner.stats.tokens == 5 + (64 * 12 if packs else 12 * (runner.stats.passes - 1))


async def test_other_models_have_their_turn_between_targets(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runners that share the engine's thread see that each other's jobs wait."""
    monkeypatch.setitem(preparing.ROWS_PER_READING, "cpu", 0)
    other = Engine(checkpoints.loaded("grouped"))
    queues: list[RequestQueue] = []
    thread = ThreadPoolExecutor(1)
    counted = Counted(engine, monkeypatch)
    runner, others = (
        Runner(engine._loaded, engine, 48, thread, pass_seconds=0.0, queues=queues)
        for engine in (engine, other)
    )
    await runner.add([lease(0, 12, targets=targets(64))])
    assert await asyncio.to_thread(counted.begun.wait, 20)
    before: list[int] = []
    run = other._run_batch

    def noted(jobs: list[TraceJob], checkpointing: bool) -> list[Outcome]:
        before.append(len(counted.batches))
        return run(jobs, checkpointing)

    monkeypatch.setattr(other, "_run_batch", noted)
    await others.add([lease(1, 5)])
    counted.go_on.set()
    assert await results(others) == ["j-1"]
    assert await results(runner) == ["j-0"]
    # The pass that was under way, and one that may have been ordered behind it.
    assert before in ([1], [2])
