"""What is accepted, and what is refused by which word."""

import asyncio

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.limits import MAX_SUBMISSION_BYTES
from scheduler.fake_worker import MODEL, FakeWorker
from scheduler.trace_calls import JobSpec, details, fields, submission

SUBMIT = "/reltrace.v1.TraceService/SubmitJobs"


@pytest.mark.parametrize("prompt", ["a", "é" * 4000])
async def test_of_very_many_faults_the_first_are_named(
    client, worker: FakeWorker, prompt: str
) -> None:
    """gRPC drops a status that is too long, and says that the server has no room."""
    faulty = [JobSpec(prompt=prompt, rule="é" * 3000, sites=["ü"])] * 1000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(*faulty))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    # From here on it is dropped by chance. Of the message, three bytes for each are sent.
    sizes = [len(value) for _, value in caught.value.trailing_metadata()]
    assert sum(sizes) + 3 * len(caught.value.details().encode()) < 7680
    named = fields(caught.value)
    assert {name.partition(".")[0] for name in named} >= {"jobs[0]", "jobs[1]"}
    message = caught.value.details()
    assert message.startswith("jobs[0].")
    assert message.endswith(f"; and {2000 - len(named)} faults more")


NEW_FIELD = b"\xa0\x1f\x01"
"""Field 500 of a message, of a client that is newer."""


@pytest.mark.parametrize("place", ["job", "target", "chat"])
async def test_what_only_a_newer_scheduler_knows_is_refused_and_not_left_out(
    client, worker: FakeWorker, place: str
) -> None:
    target = types_pb2.Target(position=-1)
    chat = types_pb2.Chat(messages=[types_pb2.Message(role="user", content="a")])
    if place == "target":
        target.MergeFromString(NEW_FIELD)
    if place == "chat":
        chat.messages[0].MergeFromString(NEW_FIELD)
    job = JobSpec(chat=chat, targets=[target])
    if place == "job":
        job.MergeFromString(NEW_FIELD)
    plain = JobSpec(chat=types_pb2.Chat(messages=[types_pb2.Message(role="user", content="a")]))
    await client.SubmitJobs(submission(plain))
    with pytest.raises(grpc.aio.AioRpcError, match="does not know: the client is newer") as caught:
        await client.SubmitJobs(submission(plain, job))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert list(fields(caught.value)) == ["jobs[1]"]


async def test_the_same_key_gives_the_same_jobs(client, worker: FakeWorker) -> None:
    first = await client.SubmitJobs(submission(JobSpec(prompt="a"), key="k"))
    again = await client.SubmitJobs(submission(JobSpec(prompt="a"), key="k"))
    assert list(again.job_ids) == list(first.job_ids)
    assert again.deduplicated
    assert not first.deduplicated


async def test_the_same_jobs_are_the_same_when_models_have_come_since(
    client, channel: grpc.aio.Channel, worker: FakeWorker
) -> None:
    """
    Given jobs that name no model, accepted while there was one
    If the same call is repeated after a second model has come
    I expect the first answer; and for another call an error that names both models.
    """
    first = await client.SubmitJobs(submission(JobSpec(prompt="a"), key="k"))
    other = types_pb2.ModelInfo()
    other.CopyFrom(MODEL)
    other.name = "second"
    await FakeWorker(channel, worker_id="w2", model=other).connect()
    async with asyncio.timeout(10):
        while len((await client.ListModels(trace_pb2.ListModelsRequest())).models) < 2:
            await asyncio.sleep(0.02)
    again = await client.SubmitJobs(submission(JobSpec(prompt="a"), key="k"))
    assert again.submission_id == first.submission_id
    assert again.deduplicated
    for request in (submission(JobSpec(prompt="a")), submission(JobSpec(prompt="b"), key="k")):
        with pytest.raises(grpc.aio.AioRpcError, match="several models are served: m, second"):
            await client.SubmitJobs(request)


async def test_the_same_jobs_within_another_span_are_the_same(client, worker: FakeWorker) -> None:
    """A process that was killed hands its jobs in again, and has another span by then."""
    spans = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2)]
    answers = [
        await client.SubmitJobs(submission(JobSpec(prompt="a", traceparent=span), key="k"))
        for span in (*spans, "")
    ]
    assert [answer.deduplicated for answer in answers] == [False, True, True]
    assert len({answer.submission_id for answer in answers}) == 1
    (lease,) = await worker.lease(1)
    assert (lease.spec.prompt, lease.spec.traceparent) == ("a", spans[0])


def chat(**contents: str) -> types_pb2.Chat:
    """Return a chat of messages by their role."""
    messages = [types_pb2.Message(role=role, content=text) for role, text in contents.items()]
    return types_pb2.Chat(messages=messages)


BAD = {
    "no input": (JobSpec(), ["jobs[0].prompt"], "is missing"),
    "empty prompt": (JobSpec(prompt=""), ["jobs[0].prompt"], "is empty"),
    "long prompt": (JobSpec(prompt="x" * (1 << 20) + "y"), ["jobs[0].prompt"], "1048577 bytes"),
    "no ids": (JobSpec(input_ids=types_pb2.TokenIds()), ["jobs[0].input_ids"], "is empty"),
    "id out of range": (
        JobSpec(input_ids=types_pb2.TokenIds(ids=[1, 100])),
        ["jobs[0].input_ids[1]"],
        "0..99",
    ),
    "too many ids": (
        JobSpec(input_ids=types_pb2.TokenIds(ids=[1] * 9)),
        ["jobs[0].input_ids"],
        "is 9 tokens; allowed: 1 to 8",
    ),
    "site": (JobSpec(prompt="a", sites=["x"]), ["jobs[0].sites[0]"], "embed, resid"),
    "site twice": (JobSpec(prompt="a", sites=["resid"] * 2), ["jobs[0].sites[1]"], "twice"),
    "rule": (JobSpec(prompt="a", rule="x"), ["jobs[0].rule"], "attnlrp"),
    "reduction": (JobSpec(prompt="a", reduction="x"), ["jobs[0].reduction"], "token"),
    "dtype": (JobSpec(prompt="a", dtype=4), ["jobs[0].dtype"], "float32"),
    "unknown dtype": (JobSpec(prompt="a", dtype=77), ["jobs[0].dtype"], "float32"),
    "target token": (
        JobSpec(prompt="a", targets=[types_pb2.Target(token=types_pb2.TokenRef(id=100))]),
        ["jobs[0].targets[0].token"],
        "0..99",
    ),
    "target text": (
        JobSpec(prompt="a", targets=[types_pb2.Target(token=types_pb2.TokenRef(text=""))]),
        ["jobs[0].targets[0].token"],
        "empty",
    ),
    "target position": (
        JobSpec(input_ids=types_pb2.TokenIds(ids=[1, 2]), targets=[types_pb2.Target(position=2)]),
        ["jobs[0].targets[0].position"],
        "2 tokens",
    ),
    "continuation and token": (
        JobSpec(
            prompt="a",
            targets=[
                types_pb2.Target(
                    token=types_pb2.TokenRef(id=1),
                    continuation=types_pb2.Continuation(text="b"),
                )
            ],
        ),
        ["jobs[0].targets[0].continuation"],
        "token",
    ),
    "edit": (
        JobSpec(prompt="a", edits=[types_pb2.Edit(site="x", value=1)]),
        ["jobs[0].edits[0].site"],
        "embed, resid",
    ),
    "sites without backward": (
        JobSpec(prompt="a", forward_only=True, sites=["resid"]),
        ["jobs[0].sites"],
        "needs a backward pass",
    ),
    "tokens to write": (
        JobSpec(prompt="a", generation=types_pb2.Generation(max_new_tokens=9)),
        ["jobs[0].generation.max_new_tokens"],
        "is 9; allowed: 1 to 8",
    ),
    "how they are drawn": (
        JobSpec(
            prompt="a",
            generation=types_pb2.Generation(max_new_tokens=1, temperature=-1, top_p=2),
        ),
        ["jobs[0].generation.temperature", "jobs[0].generation.top_p"],
        "is -1.0; allowed: 0 to 100",
    ),
    "a text and a trace": (
        JobSpec(prompt="a", sites=["resid"], generation=types_pb2.Generation(max_new_tokens=1)),
        ["jobs[0].sites"],
        "is for a trace",
    ),
    "an empty corpus": (
        JobSpec(corpus=types_pb2.Corpus(), top_k=1),
        ["jobs[0].corpus.prompts"],
        "allowed: 1 to 65536",
    ),
    "places of an atlas": (
        JobSpec(corpus=types_pb2.Corpus(prompts=["a"]), top_k=65, sites=["resid"]),
        ["jobs[0].top_k", "jobs[0].sites"],
        "allowed: 1 to 64",
    ),
    "a chat of an atlas": (
        JobSpec(
            corpus=types_pb2.Corpus(
                prompts=["", "b"], chats={0: chat(user=""), 1: chat(user="a"), 2: chat()}
            ),
            top_k=1,
        ),
        ["jobs[0].corpus.chats[1]", "jobs[0].corpus.chats[2]", "jobs[0].corpus.chats[2].messages"],
        "takes the place of an empty prompt; there are 2 prompts",
    ),
    "an empty chat": (JobSpec(chat=chat()), ["jobs[0].messages"], "allowed: 1 to 1024"),
    "a long chat": (
        JobSpec(chat=chat(system="x" * (1 << 19), user="y" * (1 << 19) + "z")),
        ["jobs[0].messages"],
        "1048577 bytes",
    ),
    "many messages": (
        JobSpec(chat=types_pb2.Chat(messages=[types_pb2.Message(role="user")] * 1025)),
        ["jobs[0].messages"],
        "is 1025 messages; allowed: 1 to 1024",
    ),
    "a message of nobody": (
        JobSpec(
            chat=types_pb2.Chat(
                messages=[
                    types_pb2.Message(role="user", content="a"),
                    types_pb2.Message(content="b"),
                    types_pb2.Message(role="r" * 65),
                ]
            )
        ),
        ["jobs[0].messages[1].role", "jobs[0].messages[2].role"],
        "allowed: 1 to 64",
    ),
    "tokens and a trace": (
        JobSpec(prompt="a", tokenize_only=True, sites=["resid"], targets=[types_pb2.Target()]),
        ["jobs[0].sites", "jobs[0].targets"],
        "asks for tokens only",
    ),
    "next tokens and a target": (
        JobSpec(
            corpus=types_pb2.Corpus(prompts=["a"], positions=1),
            top_k=1,
            targets=[types_pb2.Target()],
        ),
        ["jobs[0].targets"],
        "are the prompts' own next tokens",
    ),
    "a seed of nothing": (
        JobSpec(corpus=types_pb2.Corpus(prompts=["a"], seed=1), top_k=1),
        ["jobs[0].corpus.seed"],
        "none is asked for",
    ),
    "several faults": (
        JobSpec(prompt="", rule="x", sites=["y"]),
        ["jobs[0].prompt", "jobs[0].sites[0]", "jobs[0].rule"],
        "",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_malformed_job_is_refused_by_field(client, worker: FakeWorker, name: str) -> None:
    job, expected, said = BAD[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(job))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == expected
    assert said in (caught.value.details() or "")


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (JobSpec(prompt="a", edits=[types_pb2.Edit(site="embed", value=1)]), "edits"),
        (JobSpec(prompt="a", forward_only=True), "forward_only"),
        (JobSpec(prompt="a", generation=types_pb2.Generation(max_new_tokens=1)), "generation"),
        (JobSpec(corpus=types_pb2.Corpus(prompts=["a"]), top_k=1), "corpus"),
        (JobSpec(chat=chat(user="a")), "messages"),
        (JobSpec(prompt="a", add_special_tokens=False), "add_special_tokens"),
        (JobSpec(prompt="a", tokenize_only=True), "tokenize_only"),
    ],
)
async def test_what_a_models_workers_do_not_know_is_refused(
    client, channel: grpc.aio.Channel, job: JobSpec, field: str
) -> None:
    """A worker of an older version passes over fields that it does not know."""
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.ClearField("capabilities")
    await FakeWorker(channel, model=model).connect()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(job))
    assert fields(caught.value) == [f"jobs[0].{field}"]
    assert "is more than the workers of m can do" in (caught.value.details() or "")


@pytest.mark.parametrize("asked", [{"positions": 1}, {"keep_special": True}])
async def test_next_tokens_are_explained_only_where_workers_know_how(
    client, channel: grpc.aio.Channel, asked: dict[str, int]
) -> None:
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.capabilities.remove("corpus.positions")
    await FakeWorker(channel, model=model).connect()
    corpus = types_pb2.Corpus(prompts=["a"], **asked)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(corpus=corpus, top_k=1)))
    assert fields(caught.value) == ["jobs[0].corpus.positions"]


async def test_a_text_is_streamed_only_where_workers_know_how(
    client, channel: grpc.aio.Channel
) -> None:
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.capabilities.remove("generation.stream")
    await FakeWorker(channel, model=model).connect()
    generation = types_pb2.Generation(max_new_tokens=1)
    await client.SubmitJobs(submission(JobSpec(prompt="a", generation=generation)))
    generation.stream = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(prompt="a", generation=generation)))
    assert fields(caught.value) == ["jobs[0].generation.stream"]


async def test_special_tokens_are_added_by_any_worker(client, channel: grpc.aio.Channel) -> None:
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.capabilities.remove("add_special_tokens")
    await FakeWorker(channel, model=model).connect()
    await client.SubmitJobs(submission(JobSpec(prompt="a", add_special_tokens=True)))


async def test_chats_reach_the_worker(client, worker: FakeWorker) -> None:
    """Alone and in a corpus, with what the job says of its text."""
    jobs = [
        JobSpec(chat=chat(system="", user="é"), tokenize_only=True),
        JobSpec(chat=chat(user="b"), add_special_tokens=False, rule="x"),
        JobSpec(corpus=types_pb2.Corpus(prompts=["a", ""], chats={1: chat(user="c")}), top_k=1),
    ]
    # Messages differ and settings do not: still the second one's rule is looked at.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(*jobs))
    assert fields(caught.value) == ["jobs[1].rule"]
    jobs[1].rule = ""
    await client.SubmitJobs(submission(*jobs))
    leases = [lease for _ in jobs for lease in await worker.lease(1)]
    for lease, job in zip(leases, jobs, strict=True):
        job.model = lease.spec.model
    assert [lease.spec for lease in leases] == jobs


async def test_a_mean_is_set_only_where_workers_know_how(client, channel: grpc.aio.Channel) -> None:
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.capabilities.remove("edits.mean")
    await FakeWorker(channel, model=model).connect()
    edit = types_pb2.Edit(site="embed", scale=0)
    await client.SubmitJobs(submission(JobSpec(prompt="a", edits=[edit])))
    edit.mean = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(prompt="a", edits=[edit])))
    assert fields(caught.value) == ["jobs[0].edits.mean"]


async def test_one_malformed_job_refuses_the_request_whole(client, worker: FakeWorker) -> None:
    good = JobSpec(prompt="a")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(good, JobSpec(prompt=""), good, JobSpec()))
    assert fields(caught.value) == ["jobs[1].prompt", "jobs[3].prompt"]
    # What comes next is the first job that the worker sees.
    await client.SubmitJobs(submission(JobSpec(prompt="next")))
    (lease,) = await worker.lease(1)
    assert lease.spec.prompt == "next"


async def test_an_unknown_model_is_not_found(client, worker: FakeWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(prompt="a", model="other")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert fields(caught.value) == ["jobs[0].model"]
    assert "served: m" in (caught.value.details() or "")


async def test_a_model_must_be_named_where_there_are_two(
    client, channel: grpc.aio.Channel, worker: FakeWorker
) -> None:
    other = types_pb2.ModelInfo()
    other.CopyFrom(MODEL)
    other.name = "n"
    await FakeWorker(channel, "w2", other).connect()
    await client.SubmitJobs(submission(JobSpec(prompt="a", model="n")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(prompt="a")))
    assert fields(caught.value) == ["jobs[0].model"]
    assert "m, n" in (caught.value.details() or "")


def of_revision(revision: str, *sites: str) -> types_pb2.ModelInfo:
    model = types_pb2.ModelInfo()
    model.CopyFrom(MODEL)
    model.revision = revision
    if sites:
        model.sites[:] = sites
    return model


async def listed(client, count: int, *alive: FakeWorker) -> list[trace_pb2.ServedModel]:
    """Wait until so many models are listed. Workers that are silent do not count."""
    async with asyncio.timeout(10):
        while True:
            for worker in alive:
                await worker.send(heartbeat=worker_pb2.Heartbeat())
            found = (await client.ListModels(trace_pb2.ListModelsRequest())).models
            if len(found) == count and all(model.workers for model in found):
                return list(found)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", ["m", ""])
async def test_a_revision_must_be_named_where_two_are_served(
    client, channel: grpc.aio.Channel, name: str
) -> None:
    """
    Given two models of one name and of different weights
    I expect a job for the name to be refused, with both revisions, and one for a revision to be
    taken; and once a single revision is left, the name to mean that one, whichever came last.
    """
    first = FakeWorker(channel, "w1", of_revision("r1", "resid"))
    await first.connect()
    await client.SubmitJobs(submission(JobSpec(prompt="a", model=name)))
    second = FakeWorker(channel, "w2", of_revision("r2"))
    await second.connect()
    await listed(client, 2, first, second)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(
            submission(JobSpec(prompt="a", model="m@r1"), JobSpec(prompt="b", model=name))
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["jobs[1].model"]
    said = "'m' is served in 2 revisions; ask for one of them as NAME@REVISION: m@r1, m@r2"
    assert said in (caught.value.details() or "")
    await client.SubmitJobs(submission(JobSpec(prompt="c", model="m@r2")))

    await second.send(leave=worker_pb2.Leave())
    async with asyncio.timeout(10):
        assert await second.call.read() is grpc.aio.EOF
    (left,) = await listed(client, 1, first)
    assert (left.model.revision, left.workers) == ("r1", 1)
    # What is known of the name is what came last; jobs are checked against what is left.
    with pytest.raises(grpc.aio.AioRpcError, match="'embed' is not one of resid"):
        await client.SubmitJobs(submission(JobSpec(prompt="d", model=name, sites=["embed"])))
    await client.SubmitJobs(submission(JobSpec(prompt="d", model=name)))


async def test_a_job_without_a_model_takes_the_one_that_has_a_worker(
    client, channel: grpc.aio.Channel, worker: FakeWorker
) -> None:
    await worker.send(leave=worker_pb2.Leave())
    async with asyncio.timeout(10):
        assert await worker.call.read() is grpc.aio.EOF
    other = FakeWorker(channel, "w2", types_pb2.ModelInfo(name="n", sites=["resid"]))
    await other.connect()
    await client.SubmitJobs(submission(JobSpec(prompt="a")))
    assert (await other.lease(1))[0].spec.model == "n"


async def test_before_any_worker_came_nothing_is_accepted(client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(prompt="a")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value, RetryInfo)


async def test_a_full_queue_says_when_to_try_again(client, worker: FakeWorker) -> None:
    await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 50))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(JobSpec(prompt="a")))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (retry,) = details(caught.value, RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() > 0


async def test_an_empty_request_and_an_overlong_key(client, worker: FakeWorker) -> None:
    for request, field in (
        (submission(), "jobs"),
        (submission(*[JobSpec(prompt="a")] * 1001), "jobs"),
        (submission(JobSpec(prompt="a"), key="k" * 129), "idempotency_key"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.SubmitJobs(request)
        assert fields(caught.value) == [field]


async def test_text_that_is_not_utf8(channel: grpc.aio.Channel, worker) -> None:
    data = submission(
        JobSpec(prompt="fine"),
        JobSpec(prompt="a", targets=[types_pb2.Target(token=types_pb2.TokenRef(text="zz"))]),
    ).SerializeToString()
    call = channel.unary_unary(SUBMIT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(data.replace(b"zz", b"\xff\xfe"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["request"]
    assert "UTF-8" in (caught.value.details() or "")


async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, worker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(SUBMIT)(b"\xff\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["request"]


async def test_an_overlong_message(channel: grpc.aio.Channel, client, worker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(SUBMIT)(bytes(MAX_SUBMISSION_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["request"]
    await client.SubmitJobs(submission(JobSpec(prompt="a")))
