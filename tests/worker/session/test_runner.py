"""What goes into one pass, and an engine that does not wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine
from reltrace_worker.engine.generate import Writing
from reltrace_worker.jobs import PreparedCorpus, PreparedJob
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.runner import Runner


def lease(
    number: int,
    tokens: int,
    rule: str = "attnlrp",
    priority: types_pb2.Priority = types_pb2.PRIORITY_INTERACTIVE,
    **fields: object,
) -> worker_pb2.Lease:
    ids = types_pb2.TokenIds(ids=range(20, 20 + tokens))
    spec = types_pb2.JobSpec(input_ids=ids, rule=rule, **fields)
    return worker_pb2.Lease(job_id=f"j-{number}", attempt=1, spec=spec, priority=priority)


class Watched:
    """The engine, with every pass noted, and held until it is let go."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[tuple[str, int]]] = []
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self._run = engine.run
        monkeypatch.setattr(engine, "run", self.run)

    def run(self, batch: Sequence[PreparedJob]) -> object:
        self.passes.append([(job.rule, len(job.token_ids)) for job in batch])
        self.begun.release()
        assert self.gate.acquire(timeout=20)
        return self._run(batch)


@pytest.fixture
def engine(checkpoints: Checkpoints) -> Engine:
    return Engine(checkpoints.loaded("plain"))


@pytest.fixture
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(engine, monkeypatch)


async def results(runner: Runner) -> list[str]:
    async with asyncio.timeout(30):
        found = await runner.next_results()
    return [chunk.chunk.job_id for chunks in found for chunk in chunks]


async def test_a_pass_takes_one_rule_and_what_fits(
    checkpoints: Checkpoints, engine: Engine, watched: Watched
) -> None:
    """
    Given jobs of two rules and of lengths that do not all fit
    If they wait together
    I expect passes of one rule, full to the budget, the longest waiting job always among them.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=50)
    for _ in range(9):
        watched.gate.release()
    jobs = [
        lease(0, 30),
        lease(1, 30),
        lease(2, 10, "cp_lrp"),
        lease(3, 20),
        lease(4, 90),
        lease(5, 5, "cp_lrp"),
    ]
    assert await runner.add(jobs) == []
    order = [await results(runner) for _ in range(4)]
    assert order == [["j-0", "j-3"], ["j-1"], ["j-2", "j-5"], ["j-4"]]
    assert watched.passes == [
        [("attnlrp", 30), ("attnlrp", 20)],
        [("attnlrp", 30)],
        [("cp_lrp", 10), ("cp_lrp", 5)],
        # Longer than the budget: alone.
        [("attnlrp", 90)],
    ]


async def test_the_next_pass_begins_without_the_loop(
    checkpoints: Checkpoints, engine: Engine, watched: Watched
) -> None:
    """
    Given two passes' worth of jobs
    If the first pass ends while the event loop is busy and nobody asks for its results
    I expect the second to begin all the same, with the jobs that wait at that moment.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=50)
    await runner.add([lease(0, 40), lease(1, 20)])
    assert watched.begun.acquire(timeout=20)
    assert runner.running == {LeaseKey("j-0", 1)}
    # Arrives during the first pass, and goes into the second.
    await runner.add([lease(2, 25), lease(3, 50)])
    watched.gate.release()
    assert watched.begun.acquire(timeout=20)  # the loop stands still here
    assert runner.running == {LeaseKey("j-1", 1), LeaseKey("j-2", 1)}
    assert await results(runner) == ["j-0"]
    for _ in range(2):
        watched.gate.release()
    assert await results(runner) == ["j-1", "j-2"]
    assert await results(runner) == ["j-3"]
    assert runner.running == frozenset()


async def test_what_is_dropped_or_taken_back_does_not_run(
    checkpoints: Checkpoints, engine: Engine, watched: Watched
) -> None:
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=20)
    await runner.add([lease(number, 20) for number in range(4)])
    assert watched.begun.acquire(timeout=20)
    runner.drop({LeaseKey("j-1", 1)})
    assert runner.take_back() == [LeaseKey("j-2", 1), LeaseKey("j-3", 1)]
    watched.gate.release()
    assert await results(runner) == ["j-0"]
    # An ordered pass that found nothing is not a result, and does not stop what comes later.
    waiting = asyncio.create_task(results(runner))
    await runner.add([lease(4, 20)])
    watched.gate.release()
    assert await waiting == ["j-4"]
    assert len(watched.passes) == 2


async def test_interactive_jobs_go_before_batch_but_not_for_ever(
    checkpoints: Checkpoints, engine: Engine, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("reltrace_worker.session.runner.time.monotonic", lambda: clock[0])
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=20)
    batch = types_pb2.PRIORITY_BATCH
    await runner.add([lease(0, 20)])
    assert watched.begun.acquire(timeout=20)
    # All of these wait for the pass that is under way.
    await runner.add([lease(number, 20, priority=batch) for number in (1, 2)])
    clock[0] += 1
    await runner.add([lease(3, 20)])
    clock[0] += 10
    await runner.add([lease(4, 20)])
    for _ in range(5):
        watched.gate.release()
    order = [job for _ in range(5) for job in await results(runner)]
    assert order == ["j-0", "j-3", "j-1", "j-2", "j-4"]


async def test_topk_and_layers_reach_the_wire(checkpoints: Checkpoints, engine: Engine) -> None:
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=50)
    job = lease(0, 6, reduction="topk", layers=[2, 0], top_k=4, sites=["neuron"])
    assert await runner.add([job]) == []
    (chunks,) = await runner.next_results()
    (leased,) = chunks
    pieces = {piece.part: piece for piece in leased.chunk.tensors}
    assert list(pieces) == ["values", "token", "feature"]
    assert [list(piece.shape) for piece in pieces.values()] == [[2, 4]] * 3
    assert leased.chunk.header.layers == [2, 0]
    assert [piece.dtype for piece in pieces.values()] == [
        types_pb2.SCALAR_TYPE_FLOAT32,
        types_pb2.SCALAR_TYPE_INT32,
        types_pb2.SCALAR_TYPE_INT32,
    ]


async def test_a_result_names_its_layers(checkpoints: Checkpoints, engine: Engine) -> None:
    loaded = checkpoints.loaded("plain")
    runner = Runner(loaded, engine, max_tokens=50)
    assert await runner.add([lease(0, 6)]) == []
    (chunks,) = await runner.next_results()
    (leased,) = chunks
    assert leased.chunk.header.layers == list(range(loaded.shape.layers))


async def test_a_bad_layer_is_named(checkpoints: Checkpoints, engine: Engine) -> None:
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=50)
    (chunks,) = await runner.add([lease(0, 6, layers=[0, 3])])
    (leased,) = chunks
    (violation,) = leased.chunk.end.error.violations
    assert violation.field == "layers[1]"
    assert violation.description == "layer 3 does not exist; allowed: 0 to 2"


async def test_texts_and_traces_take_turns(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given texts of many steps, and traces that come while they are written
    I expect traces not to wait for their end, no second batch of texts beside the first, one that
    is dropped to end early, and what is half written to count as running.
    """
    monkeypatch.setattr("reltrace_worker.session.runner._STEPS", 1)
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    long = types_pb2.Generation(max_new_tokens=24)
    texts = [
        worker_pb2.Lease(
            job_id=f"t-{n}", attempt=1,
            spec=types_pb2.JobSpec(input_ids=types_pb2.TokenIds(ids=[7, 300, 12]), generation=long),
        )
        for n in range(3)
    ]  # fmt: skip
    begun: list[int] = []
    begin, loop, writes = engine.begin, asyncio.get_running_loop(), asyncio.Event()

    def counted(jobs: Sequence[PreparedJob]) -> object:
        begun.append(len(jobs))
        loop.call_soon_threadsafe(writes.set)
        return begin(jobs)

    monkeypatch.setattr(engine, "begin", counted)
    await runner.add(texts[:2])
    waiting = asyncio.create_task(results(runner))
    async with asyncio.timeout(20):
        await writes.wait()
    await runner.add([lease(0, 5), lease(1, 7), texts[2]])
    first = await waiting
    assert set(first) <= {"j-0", "j-1"}
    assert LeaseKey("t-0", 1) in runner.running
    runner.drop({LeaseKey("t-1", 1)})
    ended = list(first)
    async with asyncio.timeout(30):
        while len(ended) < 5:
            ended += await results(runner)
    assert sorted(ended) == ["j-0", "j-1", "t-0", "t-1", "t-2"]
    assert begun == [2, 1]
    assert runner.running == frozenset()


async def test_a_text_is_dropped_in_the_middle_of_its_turn(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given two texts of which the engine is just writing a token
    If nobody waits for one of them any more
    I expect the engine to write no further token of it, and all of the other.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    writes, dropped, write = threading.Event(), threading.Event(), engine.go_on
    written: list[int] = []

    def one_token(writing: Writing, tokens: int, wrote: Callable[[], None] | None = None) -> None:
        write(writing, 1, wrote)
        writes.set()
        assert dropped.wait(20)
        written[:] = [len(writing.token_ids(job)) for job in range(2)]

    monkeypatch.setattr(engine, "go_on", one_token)
    asked = types_pb2.Generation(max_new_tokens=24)
    await runner.add([lease(0, 5, generation=asked), lease(1, 5, generation=asked)])
    waiting = asyncio.create_task(results(runner))
    assert await asyncio.to_thread(writes.wait, 20)
    runner.drop({LeaseKey("j-0", 1)})
    dropped.set()
    await waiting
    assert written == [1, 24]


async def test_an_atlas_is_made_in_turns_with_traces_and_says_what_it_left_out(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a corpus of several passes, one of whose prompts is empty
    If a trace comes while its atlas is made
    I expect the trace first, then the atlas of all other prompts, its tokens, and what is missing.
    """
    monkeypatch.setattr("reltrace_worker.engine.atlas.PASS_TOKENS", 8)
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    prompts = ["The quick brown fox", "", "I have 5 cats", "The quick brown cat"] * 3
    spec = types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=prompts), top_k=4)
    begun, loop, goes = engine.begin_atlas, asyncio.get_running_loop(), asyncio.Event()

    def noted(corpus: PreparedCorpus) -> object:
        loop.call_soon_threadsafe(goes.set)
        return begun(corpus)

    monkeypatch.setattr(engine, "begin_atlas", noted)
    await runner.add([worker_pb2.Lease(job_id="atlas-0", attempt=1, spec=spec)])
    waiting = asyncio.create_task(runner.next_results())
    async with asyncio.timeout(20):
        await goes.wait()
    await runner.add([lease(0, 5)])
    async with asyncio.timeout(30):
        (trace,) = await waiting
        (atlas,) = await runner.next_results()
    assert next(iter(trace)).chunk.job_id == "j-0"
    pieces = [leased.chunk for leased in atlas]
    header = pieces[0].header
    assert [fault.field for fault in header.skipped] == [
        f"corpus.prompts[{number}]" for number in (1, 5, 9)
    ]
    assert "is empty" in header.skipped[0].description
    assert list(header.token_ids) == sorted(set(header.token_ids))
    assert len(header.tokens) == len(header.token_ids)
    assert header.provenance.reduction == "atlas"
    shape = checkpoints.loaded("plain").shape
    found = {(t.site, t.part): list(t.shape) for chunk in pieces for t in chunk.tensors}
    assert found["neuron", "strongest"] == [shape.layers, 4, 4, shape.intermediate_size]
    assert found["head", "high"] == [shape.layers, 3, shape.heads]
    assert found["corpus", "lengths"] == [12]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=["a"])), "top_k: is 0; of an atlas"),
        (types_pb2.JobSpec(corpus=types_pb2.Corpus(), top_k=1), "corpus.prompts: are 0; allowed"),
        (
            types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=["", ""]), top_k=1),
            "corpus.prompts: can not be traced, none of them: prompt: is empty",
        ),
        (
            types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=["a"]), top_k=1, rule="x"),
            "rule: rule 'x' is unknown",
        ),
    ],
)
async def test_an_atlas_that_can_not_be_made_fails_with_the_field(
    engine: Engine, checkpoints: Checkpoints, spec: types_pb2.JobSpec, said: str
) -> None:
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    (faulty,) = await runner.add([worker_pb2.Lease(job_id="a-0", attempt=1, spec=spec)])
    (leased,) = faulty
    assert said in leased.chunk.end.error.message
