"""What stands still is found, and told: by the log, heartbeats, metrics and health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from reference.leases import lease, results
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine
from reltrace_worker.session import watchdog as module
from reltrace_worker.session.leases import FailedAttempt, LeaseKey
from reltrace_worker.session.runner import Runner
from reltrace_worker.session.watchdog import LIMIT, Watchdog, Work
from reltrace_worker.types.errors import PassFailedError
from reltrace_worker.types.jobs import TraceJob, TraceRequest
from structlog.testing import capture_logs
from waiting import wait_until


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Hold threads until the test ends."""
    event = threading.Event()
    yield event
    event.set()


def watched(watchdog: Watchdog, seconds: float, start: float = 1000.0) -> Work | None:
    """Look once a second for so long."""
    work = None
    for second in range(int(seconds) + 1):
        work = watchdog._look(start + second)
    return work


def test_work_that_goes_on_is_not_stuck_however_long_it_takes() -> None:
    watchdog = Watchdog()
    with watchdog.watching("engine", [], limit=3.0) as work:
        for second in range(100):
            work.step()
            watchdog._look(1000.0 + second)
            watchdog._look(1001.0 + second)
            assert work.silent <= 1.0


def test_the_work_nearest_to_its_limit_is_told() -> None:
    watchdog = Watchdog()
    with watchdog.watching("text", [], limit=100.0), watchdog.watching("engine", [], limit=10.0):
        slowest = watched(watchdog, 7)
        assert slowest is not None
        assert (slowest.name, slowest.silent, watchdog.silent()) == ("engine", 7.0, 7.0)
    assert watchdog.slowest() is None
    assert watchdog.silent() == 0.0


def test_time_in_which_this_process_did_not_run_does_not_count() -> None:
    """
    Given a pass under way
    If the machine sleeps for an hour
    I expect the pass to have stood still for seconds.
    """
    watchdog = Watchdog()
    with watchdog.watching("engine", [], limit=60.0) as work:
        watched(watchdog, 5)
        watchdog._look(1005.0 + 3600.0)
        assert work.silent == 7.0


def test_an_event_loop_that_stands_still_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    watchdog = Watchdog()
    # The model may be loading for long: the loop has not begun.
    assert watchdog.fault() == ""
    watchdog._look(clock[0])
    clock[0] += 59
    assert watchdog.fault() == ""
    clock[0] += 2
    assert watchdog.fault() == "the event loop has stood still for 61 s"


async def test_a_pass_that_hangs_is_told_with_its_jobs_and_where_it_is(
    checkpoints: Checkpoints, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given an engine whose pass never ends
    If it stands still for longer than a first pass may
    I expect its jobs by id, tenant and size, and the stack of its thread, without any prompt.
    """
    monkeypatch.setattr(module, "_PERIOD", 0.02)
    monkeypatch.setattr("reltrace_worker.session.queue.LIMIT", 0.1)
    loaded = checkpoints.loaded("plain")
    engine, watchdog = Engine(loaded), Watchdog()

    def blocked_kernel(_: object) -> None:
        gate.wait(60)

    monkeypatch.setattr(engine, "run", blocked_kernel)
    runner = Runner(loaded, engine, 64, watchdog=watchdog)
    job = lease(7, 1)
    job.tenant = "somebody"
    job.spec.prompt = "the secret of the prompt"
    await runner.add([job])
    with capture_logs() as logs:
        async with asyncio.timeout(20):
            work = await watchdog.stuck()
    assert [one.job_id for one in work.leases] == ["j-7"]
    assert "the engine thread has stood still" in watchdog.fault()
    (entry,) = logs
    assert (entry["event"], entry["log_level"], entry["thread"]) == (
        "worker.hangs", "critical", "engine",
    )  # fmt: skip
    (told,) = entry["jobs"]
    assert told.startswith("j-7 attempt=1 tenant=somebody")
    assert "tokens=" in told
    assert "engine_0:" in entry["stack"]
    assert "in blocked_kernel" in entry["stack"]
    assert "secret" not in str(entry)


async def test_a_prompt_that_hangs_the_tokenizer_costs_none_beside_it(
    checkpoints: Checkpoints, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("plain")
    watchdog = Watchdog()
    runner = Runner(loaded, Engine(loaded), 64, watchdog=watchdog)
    prepare = runner._preparer.prepare
    calls: list[object] = []

    def second_hangs(request: object) -> object:
        calls.append(request)
        if len(calls) == 2:
            gate.wait(60)
        return prepare(request)

    monkeypatch.setattr(runner._preparer, "prepare", second_hangs)
    adding = asyncio.create_task(runner.add([lease(number, 3) for number in range(3)]))
    await asyncio.to_thread(wait_until, lambda: len(calls) == 2, "the second prompt is read")
    work = watchdog.slowest()
    assert work is not None
    assert (work.name, [one.job_id for one in work.leases], work.limit) == ("text", ["j-1"], LIMIT)
    gate.set()
    await adding
    assert await results(runner) == ["j-0", "j-1", "j-2"]
    assert watchdog.slowest() is None


async def test_a_store_that_takes_nothing_is_watched(
    checkpoints: Checkpoints, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("plain")
    watchdog = Watchdog()
    runner = Runner(loaded, Engine(loaded), 64, watchdog=watchdog)
    writing = threading.Event()

    def hangs(*_: object) -> None:
        writing.set()
        gate.wait(60)
        raise PassFailedError("the store is away")

    monkeypatch.setattr("reltrace_worker.session.results.write", hangs)
    await runner.add([lease(0, 3, output_uri="file:///nowhere")])
    waiting = asyncio.create_task(runner.next_results())
    await asyncio.to_thread(writing.wait, 20)
    work = watchdog.slowest()
    assert work is not None
    assert (work.name, [one.job_id for one in work.leases]) == ("encode", ["j-0"])
    assert work.steps == 1
    gate.set()
    assert await waiting == [FailedAttempt(LeaseKey("j-0", 1), "the store is away")]


@pytest.mark.parametrize("checkpointing", ["on", "off"])
async def test_every_layer_of_a_pass_is_a_step(
    checkpoints: Checkpoints, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, so that no pass is taken to hang for being long."""
    loaded = checkpoints.loaded("plain")
    steps = await steps_of(Runner(loaded, Engine(loaded, checkpointing), 64), monkeypatch)
    assert steps >= 2 * loaded.shape.layers - 1


async def test_every_token_of_a_text_is_a_step(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("plain")
    text = types_pb2.Generation(max_new_tokens=5)
    runner = Runner(loaded, Engine(loaded), 64)
    assert await steps_of(runner, monkeypatch, generation=text) >= 5 * loaded.shape.layers


async def test_every_prompt_of_a_corpus_is_a_step(
    checkpoints: Checkpoints, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one is tokenized for long, and no thread hangs."""
    loaded = checkpoints.loaded("plain")
    watchdog = Watchdog()
    runner = Runner(loaded, Engine(loaded), 64, watchdog=watchdog)
    trace, prompts = runner._preparer._trace, []

    def third_waits(request: TraceRequest) -> TraceJob:
        prompts.append(request.input)
        if len(prompts) == 3:
            gate.wait(60)
        return trace(request)

    monkeypatch.setattr(runner._preparer, "_trace", third_waits)
    corpus = types_pb2.Corpus(prompts=["I have", "5 cats", "and 3 dogs"])
    job = worker_pb2.Lease(
        job_id="j-0",
        attempt=1,
        spec=types_pb2.JobSpec(corpus=corpus, sites=["neuron"], reduction="atlas", top_k=2),
    )
    adding = asyncio.create_task(runner.add([job]))
    await asyncio.to_thread(wait_until, lambda: len(prompts) == 3, "the third prompt is read")
    work = watchdog.slowest()
    assert work is not None
    assert (work.name, work.steps) == ("text", 3)
    gate.set()
    assert await adding == []
    assert await results(runner) == ["j-0"]


async def steps_of(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, generation: types_pb2.Generation | None = None
) -> int:
    steps: list[int] = []
    step: Callable[[Work], None] = Work.step

    def noted(work: Work) -> None:
        step(work)
        if work.name == "engine":
            steps.append(work.steps)

    monkeypatch.setattr(Work, "step", noted)
    job = lease(0, 8)
    if generation is not None:
        job = lease(0, 8, generation=generation)
    await runner.add([job])
    assert await results(runner) == ["j-0"]
    return len(steps)
