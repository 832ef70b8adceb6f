"""How large a result may be: what is refused at once, and by the worker who sends too much."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from google.rpc import code_pb2
from reference.loaded import PROMPTS, Checkpoints, checkpoints, preparer
from reltrace_proto.v1 import types_pb2, worker_pb2
from reltrace_scheduler.api.models import Models
from reltrace_scheduler.api.result_sizes import ResultLimits
from reltrace_scheduler.api.validation import check_submission
from reltrace_scheduler.config import Settings
from reltrace_worker.engine import REDUCTIONS, SITES, result_bytes
from reltrace_worker.session.headers import model_info
from reltrace_worker.session.requests import read_request
from reltrace_worker.session.tensors import result_dtype
from scheduler.fake_worker import MODEL, FakeWorker, ended
from scheduler.trace_calls import JobSpec, collect, fields, submission

__all__ = ["checkpoints"]

MIB = 1 << 20
NO_BOUND = 1 << 60


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, max_result_bytes=MIB, max_bytes=64 * MIB, lease=30)


@pytest.fixture
async def worker(channel: grpc.aio.Channel) -> FakeWorker:
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.MergeFrom(
        types_pb2.ModelInfo(
            layers=4, hidden_size=1000, heads=8, intermediate_size=4000,
            reductions=["full", "topk", "feature"], sites=["neuron"],
        )
    )  # fmt: skip
    model.context_length = 1000
    worker = FakeWorker(channel, model=model)
    welcome = await worker.connect()
    assert welcome.max_result_bytes == MIB
    return worker


def inputs() -> list[dict[str, object]]:
    chat = types_pb2.Chat(messages=[types_pb2.Message(role="user", content="My cats")])
    ids = types_pb2.TokenIds(ids=PROMPTS[3])
    return [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[2]}, {"input_ids": ids}, {"chat": chat}]


def targets() -> list[list[types_pb2.Target]]:
    text = types_pb2.Continuation(text=" dogs and cats", each=True)
    ids = types_pb2.Continuation(ids=types_pb2.TokenIds(ids=[5, 6, 7]))
    return [
        [],
        [types_pb2.Target(), types_pb2.Target(position=2)],
        [types_pb2.Target(continuation=text)],
        [types_pb2.Target(continuation=ids)],
    ]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_size_that_is_foreseen_holds(checkpoints: Checkpoints, reduction: str) -> None:
    """
    Given jobs of every reduction, input and kind of target
    I expect what the scheduler says of their results to be true of what the worker knows.
    """
    loaded = checkpoints.loaded("grouped")
    model = model_info(loaded)
    k = 5 if reduction == "topk" else 0
    seen = 0
    for given in inputs():
        if "chat" in given and not loaded.tokenizer.chat_template:
            continue
        for aims in targets():
            for dtype in (types_pb2.SCALAR_TYPE_UNSPECIFIED, types_pb2.SCALAR_TYPE_BFLOAT16):
                spec = JobSpec(
                    **given, sites=SITES, reduction=reduction, targets=aims, top_k=k,
                    layers=[1], dtype=dtype,
                )  # fmt: skip
                job = preparer(loaded).prepare(read_request(spec))
                size = result_bytes(job, loaded.shape, result_dtype(spec))
                assert ResultLimits(NO_BOUND, None).size(spec, model).bytes > size
                assert not ResultLimits(size, None).size(spec, model).fault
                if "input_ids" in given and (not aims or aims[0].continuation.text == ""):
                    assert ResultLimits(size - 1, None).size(spec, model).fault
                seen += 1
    assert seen >= 24


@pytest.mark.parametrize("k", [1, 9])
def test_an_atlas_is_at_least_its_places(k: int) -> None:
    model = types_pb2.ModelInfo(layers=4, heads=8, intermediate_size=100)
    spec = JobSpec(corpus=types_pb2.Corpus(prompts=["a"]), top_k=k)
    least = 4 * 108 * k * 48
    assert not ResultLimits(least, None).size(spec, model).fault
    fault = ResultLimits(least - 1, None).size(spec, model).fault
    assert fault is not None
    assert fault.field == "top_k"
    assert ResultLimits(least, None).size(spec, model).bytes == least
    assert ResultLimits(NO_BOUND, least - 1).size(spec, model).bytes < 10_000


def test_what_does_not_go_through_the_queue_has_no_bound_and_takes_no_room() -> None:
    model = types_pb2.ModelInfo(layers=4, hidden_size=1000, context_length=1000)
    ids = types_pb2.TokenIds(ids=range(500))
    spec = JobSpec(input_ids=ids, reduction="full", layers=[0])
    assert ResultLimits(MIB, None).size(spec, model).fault
    assert not ResultLimits(MIB, MIB // 2).size(spec, model).fault
    assert ResultLimits(MIB, MIB // 2).size(spec, model).bytes < 100_000
    short = JobSpec(prompt="a" * 200, reduction="full", layers=[0])
    assert MIB // 2 < ResultLimits(MIB, MIB // 2).size(short, model).bytes < MIB
    # All but surely large: it will be stored, and takes next to nothing.
    text = JobSpec(prompt="word " * 500, reduction="full")
    assert ResultLimits(MIB, MIB // 2).size(text, model).bytes < MIB // 4
    assert ResultLimits(MIB, None).size(text, model).bytes == MIB
    assert not ResultLimits(MIB, None).size(text, model).fault
    spec.output_uri = "file:///srv"
    assert not ResultLimits(MIB, None).size(spec, model).fault
    assert ResultLimits(MIB, None).size(spec, model).bytes < 100_000


async def test_a_result_that_would_be_too_large_is_refused_at_once(
    client, worker: FakeWorker
) -> None:
    ids = types_pb2.TokenIds(ids=[1] * 100)
    small = JobSpec(input_ids=ids, reduction="full", layers=[0, 1])
    large = JobSpec(input_ids=ids, reduction="full", sites=["neuron"], layers=[0])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(small, large))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["jobs[1].reduction"]
    message = caught.value.details()
    for said in ("1600000 bytes (1.53 MiB)", "1 MiB", "reduce='topk'", "--results-url"):
        assert said in message
    assert (await client.SubmitJobs(submission(small))).submission_id


async def test_a_worker_that_sends_too_much_does_not_get_it_stored(
    client, worker: FakeWorker
) -> None:
    """
    Given a worker that does not keep to the bound on results
    If it sends more of one than may be stored
    I expect its lease to be over, and the job to have failed with the bound and what to do; and
    its other jobs to go on.
    """
    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 2))
    first, second = await worker.lease(2)
    for number in (1, 2, 3):
        chunk = types_pb2.ResultChunk(job_id=first.job_id, number=number)
        chunk.tensors.add(site="resid", data=bytes(MIB // 2 - 100))
        leased = worker_pb2.LeasedChunk(attempt=first.attempt, chunk=chunk)
        await worker.send(results=worker_pb2.Results(id=number, chunks=[leased]))
        if number == 3:
            revoked = (await worker.receive("revoked")).revoked.leases
            assert [ref.job_id for ref in revoked] == [first.job_id]
        await worker.receive("committed")
    # The rest was on its way.
    late = [ended(first.job_id, first.attempt, b"", 4)]
    await worker.send(results=worker_pb2.Results(id=4, chunks=late))
    assert (await worker.receive("revoked")).revoked.leases
    await worker.receive("committed")
    await worker.finish([second])
    events = await collect(client, answer.submission_id)
    assert [event.chunk.job_id for event in events] == [first.job_id, second.job_id]
    end = events[0].chunk.end
    assert (end.state, end.attempt) == (types_pb2.JOB_STATE_FAILED, 1)
    assert end.error.code == code_pb2.RESOURCE_EXHAUSTED
    assert "1 MiB" in end.error.message
    assert "--results-url" in end.error.message


def test_jobs_of_one_message_have_the_sizes_that_they_have_alone() -> None:
    """
    Given jobs with the same settings whose inputs differ in kind and length, in both orders
    I expect of each the size that it has in a message of its own.
    """
    models = Models(known={"m": MODEL}, workers={"m": 1})
    limits = ResultLimits(NO_BOUND, None)
    chat = types_pb2.Chat(messages=[types_pb2.Message(role="user", content="a")])
    ids = [types_pb2.TokenIds(ids=[1] * count) for count in (1, 5)]
    specs = [JobSpec(model="m", prompt=text) for text in ("a", "abcde", "ä" * 5)]
    specs += [*(JobSpec(model="m", input_ids=one) for one in ids), JobSpec(model="m", chat=chat)]

    def sizes(jobs: list[types_pb2.JobSpec]) -> list[int]:
        found = check_submission(submission(*jobs), models, limits)
        return [job.result_bytes for job in found]

    alone = [size for spec in specs for size in sizes([spec])]
    assert len(set(alone)) > 2
    assert sizes(specs) == alone
    assert sizes([*specs[::-1], *specs]) == alone[::-1] + alone
