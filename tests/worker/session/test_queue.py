"""Work that takes many passes, in turns with traces: texts, and the atlas of a corpus."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from google.rpc import code_pb2
from reference.leases import lease, results
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine, JobPreparer
from reltrace_worker.engine.atlas import PASS_TOKENS, Atlas
from reltrace_worker.engine.decoding import GeneratedSequence
from reltrace_worker.engine.generation import Generation
from reltrace_worker.session.leases import FailedAttempt, LeaseKey
from reltrace_worker.session.queue import QueuedJob, RequestQueue
from reltrace_worker.session.runner import Runner
from reltrace_worker.types.jobs import (
    AtlasRequest,
    Job,
    Request,
    Target,
    Term,
    TokenizedPrompt,
    TraceJob,
    TraceRequest,
)
from reltrace_worker.types.results import JobResult


@pytest.fixture
def engine(checkpoints: Checkpoints) -> Engine:
    return Engine(checkpoints.loaded("plain"))


def steps_of(engine: Engine, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let generations go on by so many tokens at a time."""
    advance = engine.advance
    monkeypatch.setattr(
        engine, "advance", lambda task, on_token=None, _=0: advance(task, on_token, steps)
    )


async def test_texts_and_traces_take_turns(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given texts of many steps, and traces and a text that come while they are written
    I expect traces not to wait for their end, the text to join the others, and nothing of one that
    is dropped.
    """
    steps_of(engine, 1, monkeypatch)
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

    def counted(jobs: Sequence[TraceJob]) -> object:
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
    runner.drop({LeaseKey("t-1", 1)})
    ended = list(first)
    async with asyncio.timeout(30):
        while len(ended) < 4:
            ended += await results(runner)
    assert sorted(ended) == ["j-0", "j-1", "t-0", "t-2"]
    assert begun == [1]
    assert not runner._queue


async def test_a_text_is_dropped_in_the_middle_of_its_turn(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given two texts of which the engine is just writing a token
    If nobody waits for one of them any more
    I expect the engine to write no further token of it, and all of the other.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    writes, dropped, advance = threading.Event(), threading.Event(), engine.advance
    written: list[int] = []

    texts: dict[int, GeneratedSequence] = {}

    def one_token(task: Generation, on_token: Callable[[], None], _: int) -> int:
        texts.update(task._open)
        steps = advance(task, on_token, steps=1)
        writes.set()
        assert dropped.wait(20)
        written[:] = [len(texts[job].ids) for job in range(2)]
        return steps

    monkeypatch.setattr(engine, "advance", one_token)
    asked = types_pb2.Generation(max_new_tokens=24)
    await runner.add([lease(0, 5, generation=asked), lease(1, 5, generation=asked)])
    waiting = asyncio.create_task(results(runner))
    assert await asyncio.to_thread(writes.wait, 20)
    runner.drop({LeaseKey("j-0", 1)})
    dropped.set()
    await waiting
    assert written == [1, 24]


async def test_a_text_is_handed_out_when_it_has_ended_and_others_join(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a long text that is being generated
    If a text of one token and one of two come
    I expect both to be handed out when the long one has gone on by two tokens, and the long one's
    turn of 16 tokens to go on after that.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    advance, writes, come = engine.advance, threading.Event(), threading.Event()
    asked: list[int] = []

    def waiting(task: Generation, on_token: Callable[[], None], steps: int) -> int:
        def after() -> None:
            if not writes.is_set():
                writes.set()
                assert come.wait(20)
            on_token()

        asked.append(steps)
        return advance(task, after, steps)

    monkeypatch.setattr(engine, "advance", waiting)
    await runner.add([lease(0, 5, generation=types_pb2.Generation(max_new_tokens=40))])
    first = asyncio.create_task(results(runner))
    assert await asyncio.to_thread(writes.wait, 20)
    await runner.add(
        [
            lease(number, 5, generation=types_pb2.Generation(max_new_tokens=number))
            for number in (1, 2)
        ]
    )
    come.set()
    assert [await first, await results(runner), await results(runner)] == [
        ["j-1"],
        ["j-2"],
        ["j-0"],
    ]
    assert asked == [16, 14, 13, 16, 16]
    assert not runner._queue
    assert runner.stats.jobs == 3
    # Every token of a prompt or a text but the last one goes through the model.
    assert runner.stats.tokens == 3 * 5 + 39 + 0 + 1


async def test_what_a_text_costs_is_its_own(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a tenant's long text and another tenant's text of one token that joins it
    I expect each of them to be charged for the tokens that were computed for it.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    charged: Counter[str] = Counter()
    monkeypatch.setattr(
        runner.stats.__class__, "charge_tenants", lambda _, __, tokens: charged.update(tokens)
    )
    leases = [
        lease(number, 5, generation=types_pb2.Generation(max_new_tokens=tokens))
        for number, tokens in enumerate((20, 1))
    ]
    for number, one in enumerate(leases):
        one.tenant = f"tenant-{number}"
    await runner.add(leases)
    assert [await results(runner), await results(runner)] == [["j-1"], ["j-0"]]
    assert charged == {"tenant-0": 5 + 19, "tenant-1": 5}


def queued(number: int, tokens: int, targets: int = 1, rule: str = "attnlrp") -> QueuedJob:
    target = Target((Term(tokens - 1, 0),))
    job = TraceJob(TokenizedPrompt((5,) * tokens, ("",) * tokens), (target,) * targets, rule=rule)
    return QueuedJob(LeaseKey(f"j-{number}", 1), worker_pb2.Lease(), job, float(number))


def sizes(queue: RequestQueue, seconds: Callable[[int], float]) -> list[int]:
    """Run all jobs that wait, passes taking so long by their tokens; return their numbers."""
    found = []
    while batch := queue.next_batch():
        found.append(len(batch))
        queue.measured(batch, seconds(sum(job.job.total_tokens for job in batch)))
    return found


def test_passes_take_about_a_second_as_is_learned_from_those_before() -> None:
    """
    Given a model that traces 800 tokens a second, plus a twentieth of a second for every pass
    I expect a small first pass, then passes of nearly a second, and each rule for itself.
    """
    queue = RequestQueue(4096)
    queue.add([queued(number, 20) for number in range(200)])
    first, *others, _ = sizes(queue, lambda tokens: 0.05 + tokens / 800)
    assert first == 12
    assert all(0.8 <= 0.05 + 20 * jobs / 800 <= 1.05 for jobs in others[2:]), others
    queue.add([queued(number, 20, rule="cp_lrp") for number in range(100)])
    assert len(queue.next_batch()) == 12


def test_passes_grow_to_the_tokens_that_fit_and_shrink_where_they_take_long() -> None:
    queue = RequestQueue(1000)
    queue.add([queued(number, 20) for number in range(200)])
    assert sizes(queue, lambda _: 0.01) == [12, 50, 50, 50, 38]
    assert queue.capacity == 1000
    queue.add([queued(number, 20) for number in range(400)])
    # Something else computes on this machine now.
    assert sizes(queue, lambda tokens: tokens / 400) == [50, *[20] * 17, 10]
    queue.add([queued(number, 20) for number in range(100)])
    # However slow it is, a pass is more than reading the weights.
    assert sizes(queue, lambda tokens: tokens / 20) == [20, *[12] * 6, 8]


def test_predictions_hold_for_short_and_long_prompts_together() -> None:
    """
    Given prompts of 8 to 600 tokens, whose attention makes long ones a third slower per token, and
    a machine whose speed varies by a fifth either way
    I expect passes of about a second, but for those of one prompt.
    """
    random = Random(1)
    queue = RequestQueue(4096)
    lengths = [random.choice([random.randint(8, 64)] * 5 + [random.randint(300, 600)])
               for _ in range(400)]  # fmt: skip
    queue.add([queued(number, length) for number, length in enumerate(lengths)])
    taken = []
    while batch := queue.next_batch():
        work = sum(
            job.job.rows * job.job.passes * (1 + job.job.total_tokens / 1500) for job in batch
        )
        seconds = (0.05 + work / 1300) * random.uniform(0.8, 1.2)
        if len(batch) > 1:
            taken.append(seconds)
        queue.measured(batch, seconds)
    assert max(taken) < 2.0
    assert 0.8 < sum(taken) / len(taken) < 1.2


def test_a_pass_may_take_ten_times_its_predicted_time_and_a_minute_at_least() -> None:
    """
    Given a queue that has measured 100 tokens per second
    I expect generous bounds: ten minutes before that, then a minute, or ten times as long as the
    tokens and targets of a long prompt are predicted to take.
    """
    queue = RequestQueue(10_000)
    short = [queued(0, 100)]
    assert queue.limit(short) == 600.0
    queue.measured(short, 1.0)
    assert queue.limit(short) == 60.0
    assert queue.limit([queued(1, 8192)]) == pytest.approx(819.2)
    # Another kind of pass has a speed of its own.
    assert queue.limit([queued(2, 8192, rule="cp_lrp")]) == 600.0


async def test_freed_memory_is_given_back_when_nothing_waits(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(engine, "trim", trimmed.set)
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    await runner.add([lease(0, 60), lease(1, 60)])
    assert await results(runner) == ["j-0"]
    assert not trimmed.is_set()
    assert await results(runner) == ["j-1"]
    waiting = asyncio.create_task(runner.next_results())
    assert await asyncio.to_thread(trimmed.wait, 20)
    waiting.cancel()


class Slow:
    """Holds the tokenizing of corpora until it is let go."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.prepared = 0
        self._prepare = runner._preparer.prepare
        monkeypatch.setattr(runner._preparer, "prepare", self.prepare)

    def prepare(self, request: Request) -> Job | TokenizedPrompt:
        if not isinstance(request, AtlasRequest):
            return self._prepare(request)
        self.prepared += 1
        self.begun.set()
        assert self.go_on.wait(20)
        return self._prepare(request)


def corpus(number: int) -> worker_pb2.Lease:
    spec = types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=["I have 5 cats"]), top_k=2)
    return worker_pb2.Lease(job_id=f"c-{number}", attempt=1, spec=spec)


async def test_nobody_waits_for_the_tokenizing_of_a_corpus_and_it_can_be_cancelled(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given three corpora of which the first is being tokenized
    If a trace comes, and two of the corpora are cancelled
    I expect the trace's result at once, and of the corpora only the one that is wanted.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    slow = Slow(runner, monkeypatch)
    adding = asyncio.create_task(runner.add([corpus(number) for number in range(3)]))
    assert await asyncio.to_thread(slow.begun.wait, 20)
    assert await runner.add([lease(0, 5)]) == []
    assert await results(runner) == ["j-0"]
    runner.drop({LeaseKey("c-0", 1), LeaseKey("c-1", 1)})
    slow.go_on.set()
    assert await adding == []
    assert set(await results(runner)) == {"c-2"}
    # What was cancelled before its turn was not even tokenized.
    assert slow.prepared == 2
    assert not runner._queue


async def test_what_is_being_tokenized_can_be_taken_back(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    slow = Slow(runner, monkeypatch)
    adding = asyncio.create_task(runner.add([corpus(0)]))
    assert await asyncio.to_thread(slow.begun.wait, 20)
    assert runner.take_back() == [LeaseKey("c-0", 1)]
    slow.go_on.set()
    assert await adding == []
    assert await runner.add([lease(0, 5)]) == []
    assert await results(runner) == ["j-0"]


async def test_an_atlas_that_can_not_begin_fails_alone(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(_: Sequence[Job]) -> object:
        raise torch.OutOfMemoryError("no room for its tables")

    monkeypatch.setattr(engine, "begin", begin)
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    await runner.add([corpus(0), lease(0, 5)])
    async with asyncio.timeout(30):
        found = [*await runner.next_results(), *await runner.next_results()]
    failed = [one for one in found if isinstance(one, FailedAttempt)]
    assert failed == [FailedAttempt(LeaseKey("c-0", 1), "no room for its tables")]
    assert len(found) == 2


async def test_nothing_comes_of_an_atlas_that_is_cancelled(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASS_TOKENS, "cpu", 8)
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=100)
    advance, dropped = engine.advance, threading.Event()
    passes: list[int] = []
    begun = threading.Event()

    def one_pass(atlas: Atlas) -> None:
        passes.append(len(atlas.job.prompts))
        begun.set()
        assert dropped.wait(20)
        advance(atlas)

    monkeypatch.setattr(engine, "advance", one_pass)
    spec = types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=["I have 5 cats"] * 9), top_k=2)
    await runner.add([worker_pb2.Lease(job_id="c-0", attempt=1, spec=spec)])
    waiting = asyncio.create_task(results(runner))
    assert await asyncio.to_thread(begun.wait, 20)
    runner.drop({LeaseKey("c-0", 1)})
    dropped.set()
    await runner.add([lease(0, 5)])
    assert await waiting == ["j-0"]
    assert len(passes) == 1
    assert runner.stats.failed == 0
    assert not runner._queue


async def test_an_atlas_is_made_in_turns_with_traces_and_says_what_it_left_out(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a corpus of several passes, one of whose prompts is empty
    If a trace comes while its atlas is made
    I expect the trace first, then the atlas of all other prompts, its tokens, and what is missing.
    """
    monkeypatch.setitem(PASS_TOKENS, "cpu", 8)
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    prompts = ["The quick brown fox", "", "I have 5 cats", "The quick brown cat"] * 3
    spec = types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=prompts), top_k=4)
    begin, loop, goes = engine.begin, asyncio.get_running_loop(), asyncio.Event()

    def noted(jobs: Sequence[Job]) -> object:
        loop.call_soon_threadsafe(goes.set)
        return begin(jobs)

    monkeypatch.setattr(engine, "begin", noted)
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


async def test_a_prompt_with_more_tokens_than_places_have_room_for_is_left_out(
    engine: Engine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reltrace_worker.engine.corpus.MAX_PROMPT_TOKENS", 12)
    runner = Runner(checkpoints.loaded("plain"), engine, 4096)
    prompts = ["I have 5 cats", "I have 5 cats and 3 dogs " * 3]
    spec = types_pb2.JobSpec(corpus=types_pb2.Corpus(prompts=prompts), top_k=2)
    await runner.add([worker_pb2.Lease(job_id="a-0", attempt=1, spec=spec)])
    async with asyncio.timeout(30):
        (atlas,) = await runner.next_results()
    (fault,) = next(iter(atlas)).chunk.header.skipped
    assert fault.field == "corpus.prompts[1]"
    assert fault.description.endswith("tokens; in an atlas at most 12")


async def test_a_contrast_in_an_atlas_is_the_callers_fault(
    engine: Engine, checkpoints: Checkpoints
) -> None:
    """Known only once its pass has run: the atlas ends with the field, and is not tried again."""
    loaded = checkpoints.loaded("plain")
    runner = Runner(loaded, engine, 4096)
    (traced,) = engine.run([JobPreparer(loaded).prepare(TraceRequest("I have 5 cats"))])
    assert isinstance(traced, JobResult)
    lease = corpus(0)
    largest = types_pb2.TokenRef(id=traced.targets[0].token_id)
    lease.spec.targets.add(contrast=largest)
    await runner.add([lease])
    async with asyncio.timeout(30):
        (chunks,) = await runner.next_results()
    assert not isinstance(chunks, FailedAttempt)
    (leased,) = chunks
    error = leased.chunk.end.error
    assert error.code == code_pb2.INVALID_ARGUMENT
    assert [fault.field for fault in error.violations] == ["targets[0].contrast"]
    assert not runner._queue


async def test_a_text_says_how_it_was_written(engine: Engine, checkpoints: Checkpoints) -> None:
    loaded = checkpoints.loaded("plain")
    runner = Runner(loaded, engine, 4096)
    await runner.add([lease(0, 5, generation=types_pb2.Generation(max_new_tokens=2))])
    async with asyncio.timeout(30):
        (text,) = await runner.next_results()
    provenance = next(iter(text)).chunk.header.provenance
    assert (provenance.rule, provenance.reduction, provenance.attention) == ("", "", "sdpa")
    assert (provenance.model, provenance.dtype) == (loaded.name, types_pb2.SCALAR_TYPE_FLOAT32)


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
