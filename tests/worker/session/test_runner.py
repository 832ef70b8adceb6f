"""What goes into one pass, and an engine that does not wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from google.rpc import code_pb2
from reference.chat_templates import STRICT
from reference.leases import lease, results
from reference.loaded import Checkpoints
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_worker.engine import Engine
from reltrace_worker.session.leases import LeaseKey
from reltrace_worker.session.runner import Runner
from reltrace_worker.types.jobs import TraceJob


class Watched:
    """The engine, with every pass noted, and held until it is let go."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[tuple[str, int]]] = []
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self._run = engine.run
        monkeypatch.setattr(engine, "run", self.run)

    def run(self, batch: Sequence[TraceJob]) -> object:
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
    assert watched.passes == [[("attnlrp", 40)]]
    # Arrives during the first pass, and goes into the second.
    await runner.add([lease(2, 25), lease(3, 50)])
    watched.gate.release()
    assert watched.begun.acquire(timeout=20)  # the loop stands still here
    assert watched.passes[1:] == [[("attnlrp", 20), ("attnlrp", 25)]]
    assert await results(runner) == ["j-0"]
    for _ in range(2):
        watched.gate.release()
    assert await results(runner) == ["j-1", "j-2"]
    assert await results(runner) == ["j-3"]
    assert not runner._queue


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


async def test_tokens_alone_do_not_wait_for_a_pass(
    checkpoints: Checkpoints, engine: Engine, watched: Watched
) -> None:
    """
    Given a pass that is under way
    If a job asks for its tokens only
    I expect them at once, with text and offsets, and no pass of its own.
    """
    loaded = checkpoints.loaded("plain")
    runner = Runner(loaded, engine, max_tokens=50)
    await runner.add([lease(0, 40)])
    assert watched.begun.acquire(timeout=20)
    spec = types_pb2.JobSpec(prompt="My café ", tokenize_only=True)
    asked = worker_pb2.Lease(job_id="j-1", attempt=1, spec=spec)
    (chunks,) = await runner.add([asked, lease(2, 30)])
    (leased,) = chunks
    header = leased.chunk.header
    assert leased.chunk.end.state == types_pb2.JOB_STATE_SUCCEEDED
    assert (leased.chunk.job_id, header.text) == ("j-1", "<s>My café ")
    assert len(header.offsets) == 2 * len(header.token_ids)
    assert list(header.offsets[:2]) == [0, 3]
    assert list(header.special_positions) == [0]
    assert "ends in a space" in header.hints[0]
    assert not header.targets
    assert header.provenance.revision == loaded.revision
    for _ in range(2):
        watched.gate.release()
    assert [await results(runner), await results(runner)] == [["j-0"], ["j-2"]]
    assert [tokens for run in watched.passes for _, tokens in run] == [40, 30]


async def test_a_chat_and_what_is_told_of_it_reach_the_wire(
    checkpoints: Checkpoints, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.loaded("plain")
    monkeypatch.setattr(loaded.tokenizer, "chat_template", STRICT)
    runner = Runner(loaded, engine, max_tokens=50)
    messages = [
        types_pb2.Message(role="user", content=" My cats"),
        types_pb2.Message(role="assistant", content="é"),
    ]
    spec = types_pb2.JobSpec(chat=types_pb2.Chat(messages=messages))
    bare = types_pb2.JobSpec(prompt="My cats", add_special_tokens=False)
    added = types_pb2.JobSpec(prompt="My cats", add_special_tokens=True)
    specs = (spec, bare, added)
    leases = [
        worker_pb2.Lease(job_id=f"j-{number}", attempt=1, spec=spec)
        for number, spec in enumerate(specs)
    ]
    assert await runner.add(leases) == []
    headers = [chunk.chunk.header for chunks in await runner.next_results() for chunk in chunks]
    chat, without, with_bos = sorted(headers, key=lambda header: -len(header.token_ids))
    assert chat.text == "<s>[user] My cats [assistant] é [assistant]"
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    spans = list(zip(chat.offsets[::2], chat.offsets[1::2], strict=True))
    said = [chat.text[spans[turn.first][0] : spans[turn.stop - 1][1]] for turn in chat.turns]
    assert [text.strip() for text in said] == ["My cats", "é"]
    candidates = chat.targets[0].candidates
    assert len(candidates) == 10
    assert candidates[0].token_id == chat.targets[0].token_id
    assert candidates[0].logit == chat.targets[0].logit
    assert 0 < sum(candidate.probability for candidate in candidates) <= 1
    assert {with_bos.text, without.text} == {"<s>My cats", "My cats"}


async def test_a_chat_for_a_model_without_a_template_fails_with_the_field(
    checkpoints: Checkpoints, engine: Engine
) -> None:
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=50)
    messages = [types_pb2.Message(role="user", content="a")]
    spec = types_pb2.JobSpec(chat=types_pb2.Chat(messages=messages))
    (chunks,) = await runner.add([worker_pb2.Lease(job_id="j-0", attempt=1, spec=spec)])
    (leased,) = chunks
    error = leased.chunk.end.error
    assert error.code == code_pb2.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["messages"]
    assert "has none" in error.message


@pytest.mark.parametrize(
    ("url", "given", "refused"),
    [
        ("", {}, True),
        ("memory://large", {}, False),
        ("", {"output_uri": "memory://own"}, False),
        ("", {"reduction": "token"}, False),
    ],
    ids=["nowhere", "a store", "its own folder", "less"],
)
async def test_a_result_that_could_not_be_sent_is_refused_before_its_pass(
    checkpoints: Checkpoints,
    engine: Engine,
    watched: Watched,
    url: str,
    given: dict[str, str],
    refused: bool,
) -> None:
    """
    Given a bound on the results that a worker may send
    If the result of one job of two would be larger
    I expect it to fail at once, with its size, the bound and what to do, and the other to be
    traced; and none to fail where large results have a place.
    """
    loaded = checkpoints.loaded("plain")
    shape = loaded.shape
    size = 30 * shape.layers * (shape.intermediate_size + shape.hidden_size) * 4
    runner = Runner(loaded, engine, max_tokens=50)
    runner.store_large(url, size // 2, size - 1)
    large = {"reduction": "full", "sites": ["neuron", "resid"]} | given
    ended = await runner.add([lease(0, 30, **large), lease(1, 10)])
    watched.gate.release()
    others = await results(runner)
    if not refused:
        assert not ended
        assert sorted(others) == ["j-0", "j-1"]
        return
    assert others == ["j-1"]
    assert watched.passes == [[("attnlrp", 10)]]
    ((leased,),) = ended
    end = leased.chunk.end
    assert (leased.chunk.job_id, end.state) == ("j-0", types_pb2.JOB_STATE_FAILED)
    assert end.error.code == code_pb2.RESOURCE_EXHAUSTED
    for said in (f"{size} bytes", f"{size - 1} ", "reduce='topk'", "output_uri", "--results-url"):
        assert said in end.error.message


async def test_a_job_that_names_anothers_folder_is_not_begun(
    checkpoints: Checkpoints, engine: Engine, watched: Watched, tmp_path: Path
) -> None:
    """
    Given a scheduler that names the folders of tenants
    If it leases a job whose folder is another's, or two in one URL
    I expect the job to fail without a pass, and nothing to be written.
    """
    runner = Runner(checkpoints.loaded("plain"), engine, max_tokens=50)
    folder = tmp_path.as_uri()
    runner.store_large("", 0, 0, [f"{folder}/{{tenant}}"])
    leases = [
        lease(0, 5, output_uri=f"{folder}/b"),
        lease(1, 5, output_uri=f"{folder}/a/x.safetensors::file:///x"),
        lease(2, 5, output_uri=f"{folder}/a/run"),
    ]
    for each in leases:
        each.tenant = "a"
    ended = await runner.add(leases)
    watched.gate.release()
    assert await results(runner) == ["j-2"]
    ends = [leased.chunk.end for ((leased,),) in [[tuple(chunks)] for chunks in ended]]
    assert [end.error.violations[0].field for end in ends] == ["output_uri", "output_uri"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
