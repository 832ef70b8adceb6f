import asyncio

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status
from reltrace_proto.v1 import trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.config import MAX_REQUEST_BYTES
from reltrace_scheduler.store.store import Store
from scheduler.fake_worker import MODEL, FakeWorker

JobSpec = types_pb2.JobSpec
SUBMIT = "/reltrace.v1.TraceService/SubmitJobs"


def submission(*jobs: JobSpec, key: str = "") -> trace_pb2.SubmitJobsRequest:
    return trace_pb2.SubmitJobsRequest(jobs=jobs, idempotency_key=key)


def details(error: grpc.aio.AioRpcError, kind: type) -> list:
    """Details of a status that are of one kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    found = []
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


def fields(error: grpc.aio.AioRpcError) -> list[str]:
    return [v.field for bad in details(error, BadRequest) for v in bad.field_violations]


async def collect(client, submission_id: str, after: int = 0, chunk: int = 0) -> list:
    request = trace_pb2.StreamResultsRequest(
        submission_id=submission_id, after_entry=after, after_chunk=chunk
    )
    async with asyncio.timeout(20):
        return [
            event async for message in client.StreamResults(request) for event in message.events
        ]


async def test_a_job_from_submission_to_acknowledgement(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    leases = await worker.lease(2)
    assert [lease.spec.prompt for lease in leases] == ["a", "b"]
    assert {lease.spec.model for lease in leases} == {"m"}
    await worker.finish(leases, b"data")

    events = await collect(client, answer.submission_id)

    assert [event.entry for event in events] == [1, 2]
    assert [event.chunk.job_id for event in events] == list(answer.job_ids)
    assert {event.chunk.tensors[0].data for event in events} == {b"data"}
    assert await collect(client, answer.submission_id) == events
    await client.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(submission_id=answer.submission_id, through_entry=2)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(client, answer.submission_id)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert fields(caught.value) == ["submission_id"]


async def test_results_are_streamed_as_they_come(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    first, second = await worker.lease(2)
    stream = client.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)
    )
    await worker.finish([second])
    async with asyncio.timeout(10):
        assert (await stream.read()).events[0].chunk.job_id == second.job_id
        await worker.finish([first])
        assert (await stream.read()).events[0].chunk.job_id == first.job_id
        assert await stream.read() is grpc.aio.EOF


async def test_a_stream_goes_on_after_the_last_chunk_seen(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 5))
    await worker.finish(await worker.lease(5), bytes(600_000))
    whole = await collect(client, answer.submission_id)
    for after in range(5):
        assert await collect(client, answer.submission_id, after) == whole[after:]
    assert await collect(client, answer.submission_id, 2, 1) == whole[3:]


async def test_a_stream_from_what_was_acknowledged_waits_for_the_rest(
    client, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a submission of which one result was acknowledged, and another is to come
    If its stream is read from the beginning, or behind the only chunk of what was acknowledged
    I expect it to wait, and not to look again and again; and then to give what comes, once.
    """
    looks = []
    progress = Store.progress

    async def counted(store: Store, submission_id: str) -> object:
        looks.append(submission_id)
        return await progress(store, submission_id)

    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 3))
    first, second, third = await worker.lease(3)
    await worker.finish([first, second], b"data")
    await worker.receive("committed")
    await client.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(submission_id=answer.submission_id, through_entry=1)
    )
    other = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 2))
    gone, open_ = await worker.lease(2)
    await worker.finish([gone], b"data")
    await worker.receive("committed")
    await client.AcknowledgeResults(
        trace_pb2.AcknowledgeResultsRequest(submission_id=other.submission_id, through_entry=1)
    )
    monkeypatch.setattr(Store, "progress", counted)
    readers = [
        asyncio.create_task(collect(client, answer.submission_id, *position))
        for position in ((0, 0), (1, 0), (1, 1))
    ]
    readers.append(asyncio.create_task(collect(client, other.submission_id)))
    for _ in range(50):
        await client.GetJobs(trace_pb2.GetJobsRequest(job_ids=answer.job_ids))
    assert len(looks) < 20
    await worker.finish([third, open_], b"data")
    found = [[event.entry for event in await reader] for reader in readers]
    assert found == [[2, 3], [2, 3], [3], [2]]


@pytest.mark.parametrize("prompt", ["a", "é" * 4000])
async def test_of_very_many_faults_the_first_are_named(
    client, worker: FakeWorker, prompt: str
) -> None:
    """gRPC drops a status that is too long, and says that the server has no room."""
    faulty = [JobSpec(prompt=prompt, rule="é" * 3000, sites=["ü"])] * 1000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.SubmitJobs(submission(*faulty))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    named = fields(caught.value)
    assert {name.partition(".")[0] for name in named} >= {"jobs[0]", "jobs[1]"}
    message = caught.value.details()
    assert message.startswith("jobs[0].")
    assert message.endswith(f"; and {2000 - len(named)} faults more")


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
        "at most 8",
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
        "9 is not in 1..8",
    ),
    "how they are drawn": (
        JobSpec(
            prompt="a",
            generation=types_pb2.Generation(max_new_tokens=1, temperature=-1, top_p=2),
        ),
        ["jobs[0].generation.temperature", "jobs[0].generation.top_p"],
        "must be 0 to 100",
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


async def test_text_that_is_not_utf8_is_named(channel: grpc.aio.Channel, worker) -> None:
    data = submission(
        JobSpec(prompt="fine"),
        JobSpec(prompt="a", targets=[types_pb2.Target(token=types_pb2.TokenRef(text="zz"))]),
    ).SerializeToString()
    call = channel.unary_unary(SUBMIT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(data.replace(b"zz", b"\xff\xfe"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["jobs[1].targets[0].token.text"]


async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, worker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(SUBMIT)(b"\xff\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["request"]


async def test_an_overlong_message(channel: grpc.aio.Channel, client, worker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(SUBMIT)(bytes(MAX_REQUEST_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(caught.value) == ["request"]
    await client.SubmitJobs(submission(JobSpec(prompt="a")))


async def test_states_of_jobs(client, worker: FakeWorker) -> None:
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a"), JobSpec(prompt="b")))
    await worker.lease(1)
    jobs = (await client.GetJobs(trace_pb2.GetJobsRequest(job_ids=[*answer.job_ids, "none"]))).jobs
    assert [(job.state, job.worker_id) for job in jobs] == [
        (types_pb2.JOB_STATE_LEASED, "w1"),
        (types_pb2.JOB_STATE_QUEUED, ""),
        (types_pb2.JOB_STATE_UNSPECIFIED, ""),
    ]


async def test_models_and_their_workers(client, channel, worker: FakeWorker) -> None:
    await FakeWorker(channel, "w2").connect()
    (served,) = (await client.ListModels(trace_pb2.ListModelsRequest())).models
    assert served.model == MODEL
    assert served.workers == 2


def draft(lease: worker_pb2.Lease, first: int, *ids: int) -> types_pb2.Draft:
    tokens = [str(token) for token in ids]
    return types_pb2.Draft(
        job_id=lease.job_id, attempt=lease.attempt, first=first, token_ids=ids, tokens=tokens,
        text="".join(tokens),
    )  # fmt: skip


async def test_who_reads_along_gets_drafts_before_the_result(client, worker: FakeWorker) -> None:
    """
    Given a job whose worker sends drafts
    If its results are read with its drafts, and by somebody else without
    I expect the drafts in order and then the result, and nothing but the result; and the drafts
    from the first on for who connects again.
    """
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a")))
    (job_id,) = answer.job_ids
    (lease,) = await worker.lease(1)
    request = trace_pb2.StreamResultsRequest(submission_id=answer.submission_id, drafts_of=[job_id])
    reading = client.StreamResults(request)
    async with asyncio.timeout(20):
        for first, ids in ((0, (7,)), (1, (8, 9))):
            sent = draft(lease, first, *ids)
            await worker.send(drafts=worker_pb2.Drafts(drafts=[sent]))
            message = await reading.read()
            assert list(message.drafts) == [sent]
            assert not message.events
        again = await client.StreamResults(request).read()
        assert [list(one.token_ids) for one in again.drafts] == [[7], [8, 9]]
        await worker.finish([lease])
        (event,) = (await reading.read()).events
        assert event.chunk.job_id == job_id
        assert await reading.read() is grpc.aio.EOF
    assert len(await collect(client, answer.submission_id)) == 1


async def test_who_reads_late_gets_all_drafts_in_messages_of_bounded_size(
    client, worker: FakeWorker
) -> None:
    """
    Given more drafts of some jobs than one message may hold
    If somebody comes to read them
    I expect each of them once, in order, in several messages.
    """
    answer = await client.SubmitJobs(submission(*[JobSpec(prompt="a")] * 8))
    leases = await worker.lease(8)
    sent = []
    for lease in leases:
        own = [draft(lease, first, first) for first in range(4)]
        for one in own:
            one.text = "x" * 200_000
        await worker.send(drafts=worker_pb2.Drafts(drafts=own))
        sent += own
    # Messages of a worker are handled in order: once this one is answered, all are there.
    await worker.finish(leases[:1])
    await worker.receive("committed")
    sizes, found = [], []
    reading = client.StreamResults(
        trace_pb2.StreamResultsRequest(
            submission_id=answer.submission_id, after_entry=1, drafts_of=answer.job_ids[1:]
        )
    )
    async with asyncio.timeout(20):
        while len(found) < len(sent) - 4:
            message = await reading.read()
            sizes.append(message.ByteSize())
            found += message.drafts
    reading.cancel()
    assert found == [one for one in sent if one.job_id != answer.job_ids[0]]
    assert max(sizes) < 1.1 * 2**20


async def test_drafts_of_other_submissions_are_refused(client, worker: FakeWorker) -> None:
    mine = await client.SubmitJobs(submission(JobSpec(prompt="a")))
    other = await client.SubmitJobs(submission(JobSpec(prompt="b")))
    for drafts_of, field in (
        ([*mine.job_ids, *other.job_ids], "drafts_of[1]"),
        (["nonsense"], "drafts_of[0]"),
        (list(mine.job_ids) * 17, "drafts_of"),
    ):
        request = trace_pb2.StreamResultsRequest(
            submission_id=mine.submission_id, drafts_of=drafts_of
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.StreamResults(request).read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields(error.value) == [field]
