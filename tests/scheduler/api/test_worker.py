import asyncio
from collections import Counter
from dataclasses import replace

import grpc
import pytest
import redis.asyncio
import structlog
from google.protobuf.duration_pb2 import Duration
from reltrace_proto import protocol
from reltrace_proto.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from reltrace_scheduler.api import worker as worker_module
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.queue.connection import Connection
from scheduler.fake_worker import MODEL, FakeWorker, ended

JobSpec = types_pb2.JobSpec
LEASE = 0.5  # seconds, as in the settings fixture


async def submit(client, count: int) -> trace_pb2.SubmitJobsResponse:
    return await client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=[JobSpec(prompt="a")] * count))


def refs(leases: list[worker_pb2.Lease]) -> list[worker_pb2.LeaseRef]:
    return [worker_pb2.LeaseRef(job_id=x.job_id, attempt=x.attempt) for x in leases]


async def ends(client, submission_id: str) -> list[types_pb2.JobEnd]:
    request = trace_pb2.StreamResultsRequest(submission_id=submission_id)
    async with asyncio.timeout(30):
        return [
            event.chunk.end
            async for message in client.StreamResults(request)
            for event in message.events
            if event.chunk.HasField("end")
        ]


async def test_a_worker_learns_the_lease_and_the_heartbeat(channel: grpc.aio.Channel) -> None:
    welcome = await FakeWorker(channel).connect()
    assert welcome.lease.ToMilliseconds() == 500
    assert 0 < welcome.heartbeat.ToMilliseconds() <= 250


async def test_a_worker_is_asked_to_connect_again_when_its_time_is_over(
    store: redis.asyncio.Redis, redis_url: str, settings: Settings
) -> None:
    """
    Given connections that last half a second
    If a worker is asked to connect again, and commits a result and closes its side then
    I expect the commit to be answered, nothing to be leased any more, the stream to end well, and
    the other leases to hold in the next one.
    """
    settings = replace(settings, connection_age=0.5, lease=30.0)
    redis_client = redis.asyncio.Redis.from_url(redis_url)
    async with (
        serving(Connection(redis_client, "test"), settings) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        client = trace_pb2_grpc.TraceServiceStub(channel)
        worker = FakeWorker(channel)
        await worker.connect()
        submitted = await submit(client, 20)
        leases = await worker.lease(10)
        await worker.receive("reconnect")
        await worker.send(ready=worker_pb2.Ready(jobs=10))
        await worker.finish(leases[:3])
        await worker.call.done_writing()
        await worker.receive("committed")
        async with asyncio.timeout(10):
            assert await worker.call.read() is grpc.aio.EOF
        assert await worker.call.code() is grpc.StatusCode.OK
        await worker.connect(holding=leases[3:])
        await worker.finish(leases[3:])
        await worker.receive("committed")
        jobs = (await client.GetJobs(trace_pb2.GetJobsRequest(job_ids=submitted.job_ids))).jobs
        assert Counter((job.state, job.attempt) for job in jobs) == {
            (types_pb2.JOB_STATE_SUCCEEDED, 1): 10,
            (types_pb2.JOB_STATE_QUEUED, 0): 10,
        }
    await redis_client.aclose()


@pytest.mark.parametrize("knows", [True, False])
async def test_a_worker_that_does_not_heed_the_request_is_sent_away(
    store: redis.asyncio.Redis,
    redis_url: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    knows: bool,
) -> None:
    """After a deadline; at once where its protocol is older than the request."""
    monkeypatch.setattr(worker_module, "_RECONNECT_DEADLINE", 0.2 if knows else 60.0)
    redis_client = redis.asyncio.Redis.from_url(redis_url)
    async with (
        serving(Connection(redis_client, "test"), replace(settings, connection_age=0.3)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(channel, protocol=int(knows))
        await worker.connect()
        if knows:
            await worker.receive("reconnect")
        async with asyncio.timeout(10):
            assert await worker.call.read() is grpc.aio.EOF
        assert await worker.call.code() is grpc.StatusCode.OK
    await redis_client.aclose()


async def test_a_worker_of_an_older_protocol_is_refused_with_both_versions(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a worker from before there were versions
    I expect it to be served, and told the scheduler's, until that serves versions from 1 on only.
    """
    worker = FakeWorker(channel, protocol=0)
    assert (await worker.connect()).protocol == protocol.PROTOCOL
    monkeypatch.setattr(protocol, "OLDEST_PROTOCOL", 1)
    with pytest.raises(grpc.aio.AioRpcError, match=r"version 0 .* versions 1 to 1") as caught:
        await FakeWorker(channel, "w2", protocol=0).connect()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_no_more_is_leased_than_there_is_room_for(client, worker: FakeWorker) -> None:
    await submit(client, 5)
    assert len(await worker.lease(2)) == 2
    assert len(await worker.lease(3)) == 3


async def test_a_waiting_worker_is_woken_by_a_submission(client, worker: FakeWorker) -> None:
    await worker.send(ready=worker_pb2.Ready(jobs=1))
    await submit(client, 1)
    assert (await worker.receive("leases")).leases.leases


async def test_a_commit_is_answered_by_its_number(client, worker: FakeWorker) -> None:
    await submit(client, 1)
    await worker.finish(await worker.lease(1))
    assert (await worker.receive("committed")).committed.id == 7


async def test_a_silent_worker_loses_its_jobs_to_another(
    client, channel: grpc.aio.Channel, worker: FakeWorker
) -> None:
    answer = await submit(client, 1)
    (lost,) = await worker.lease(1)
    other = FakeWorker(channel, "w2")
    await other.connect()
    (found,) = await other.lease(1)
    assert (found.job_id, found.attempt) == (lost.job_id, 2)

    await worker.finish([lost])
    assert (await worker.receive("revoked")).revoked.leases == refs([lost])
    await other.finish([found])
    assert [end.attempt for end in await ends(client, answer.submission_id)] == [2]


async def test_who_is_silent_is_leased_nothing_until_heard_again(
    client, channel: grpc.aio.Channel, worker: FakeWorker
) -> None:
    """
    Given a worker that has a job, has room for more, and falls silent while its stream stays open
    If its lease is lost
    I expect the job to go to another, not to the silent one again, which gets the next job
    once it is heard.
    """
    await submit(client, 1)
    (lost,) = await worker.lease(1)
    await worker.send(ready=worker_pb2.Ready(jobs=2))
    other = FakeWorker(channel, "w2")
    await other.connect()
    (found,) = await other.lease(1)
    assert (found.job_id, found.attempt) == (lost.job_id, 2)
    answer = await submit(client, 1)
    await worker.send(heartbeat=worker_pb2.Heartbeat())
    (late,) = (await worker.receive("leases")).leases.leases
    assert (late.job_id, late.attempt) == (answer.job_ids[0], 1)


async def test_heartbeats_keep_a_lease(client, channel, worker: FakeWorker) -> None:
    await submit(client, 1)
    leases = await worker.lease(1)
    other = FakeWorker(channel, "w2")
    await other.connect()
    await other.send(ready=worker_pb2.Ready(jobs=1))
    for _ in range(30):
        await worker.send(heartbeat=worker_pb2.Heartbeat(leases=refs(leases)))
        await asyncio.sleep(LEASE / 5)
    await worker.finish(leases)
    # A commit, and nothing revoked: the lease was never lost.
    await worker.receive("committed")


async def test_a_pass_that_takes_long_and_goes_on_keeps_its_lease(
    client, channel, worker: FakeWorker
) -> None:
    """
    Given a worker whose pass has stood still for longer than a lease, within what it may
    I expect its lease to be renewed, and operators to be shown for how long.
    """
    admin = admin_pb2_grpc.AdminServiceStub(channel)
    await submit(client, 1)
    leases = await worker.lease(1)
    other = FakeWorker(channel, "w2")
    await other.connect()
    await other.send(ready=worker_pb2.Ready(jobs=1))
    for _ in range(10):
        await beat(worker, leases, silent=40, limit=60)
        await asyncio.sleep(LEASE / 5)
    (status,) = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers[:1]
    assert (status.worker_id, status.silent.seconds) == ("w1", 40)
    await beat(worker, leases, silent=0, limit=60)
    await worker.finish(leases)
    await worker.receive("committed")
    (status,) = (await admin.ListWorkers(admin_pb2.ListWorkersRequest())).workers[:1]
    assert not status.HasField("silent")


async def test_a_worker_that_hangs_and_does_not_leave_loses_its_lease(
    client, channel, worker: FakeWorker
) -> None:
    """
    Given a worker whose heartbeats tell that its pass stands still, twice as long as it may
    I expect its lease to be lost although it goes on naming it, and nothing new to be leased to it.
    """
    answer = await submit(client, 1)
    leases = await worker.lease(1)
    await worker.send(ready=worker_pb2.Ready(jobs=2))
    other = FakeWorker(channel, "w2")
    await other.connect()
    stalled = asyncio.create_task(keep_beating(worker, leases, silent=121, limit=60))
    (found,) = await other.lease(1)
    assert (found.job_id, found.attempt) == (answer.job_ids[0], 2)
    await other.finish([found])
    assert [end.attempt for end in await ends(client, answer.submission_id)] == [2]
    await submit(client, 1)
    await other.receive("committed")
    await other.lease(1)
    stalled.cancel()


async def keep_beating(worker: FakeWorker, leases, *, silent: int, limit: int) -> None:
    while True:
        await beat(worker, leases, silent=silent, limit=limit)
        await asyncio.sleep(LEASE / 5)


async def beat(worker: FakeWorker, leases, *, silent: int, limit: int) -> None:
    progress = worker_pb2.Progress(silent=Duration(seconds=silent), limit=Duration(seconds=limit))
    await worker.send(heartbeat=worker_pb2.Heartbeat(leases=refs(leases), progress=progress))


async def test_what_a_worker_says_of_no_lease_of_its_own(client, worker: FakeWorker) -> None:
    """An attempt of another's job does not fail, and no time is too long."""
    progress = worker_pb2.Progress(silent=Duration(seconds=1 << 62))
    await worker.send(heartbeat=worker_pb2.Heartbeat(progress=progress))
    error = types_pb2.JobError(code=13, message="x")
    ref = worker_pb2.LeaseRef(job_id="nope", attempt=1)
    await worker.send(release=worker_pb2.Release(leases=[ref], error=error))
    with structlog.testing.capture_logs() as logs:
        await submit(client, 1)
        assert await worker.lease(1)
    assert not [line for line in logs if line["event"] in ("attempt.failed", "rpc.failed")]


async def test_a_heartbeat_for_a_foreign_lease_is_revoked(client, channel, worker) -> None:
    await submit(client, 1)
    leases = await worker.lease(1)
    thief = FakeWorker(channel, "thief")
    await thief.connect()
    await thief.send(heartbeat=worker_pb2.Heartbeat(leases=refs(leases)))
    assert (await thief.receive("revoked")).revoked.leases == refs(leases)


async def test_a_job_that_kills_its_workers_is_quarantined(client, channel) -> None:
    await FakeWorker(channel, "w0").connect()
    answer = await submit(client, 1)
    for number in range(3):
        worker = FakeWorker(channel, f"w{number}")
        await worker.connect()
        (lease,) = await worker.lease(1)
        assert lease.attempt == number + 1
        worker.call.cancel()
    (end,) = await ends(client, answer.submission_id)
    assert end.state == types_pb2.JOB_STATE_QUARANTINED
    assert "3 times" in end.error.message
    assert "attempt 2 on w1" in end.error.message


async def test_released_jobs_go_to_another_at_once(client, channel, worker: FakeWorker) -> None:
    await submit(client, 2)
    leases = await worker.lease(2)
    await worker.send(release=worker_pb2.Release(leases=refs(leases)))
    other = FakeWorker(channel, "w2")
    await other.connect()
    assert {lease.attempt for lease in await other.lease(2)} == {2}


async def test_who_hands_jobs_back_is_leased_nothing_more(client, channel) -> None:
    worker = FakeWorker(channel)
    await worker.connect()
    await submit(client, 2)
    leases = await worker.lease(2)
    await worker.send(ready=worker_pb2.Ready(jobs=10))
    await worker.send(release=worker_pb2.Release(leases=refs(leases)))
    other = FakeWorker(channel, "w2")
    await other.connect()
    assert {lease.attempt for lease in await other.lease(2)} == {2}


async def test_what_crosses_a_workers_leaving_is_queued_at_once(client, channel) -> None:
    worker = FakeWorker(channel)
    await worker.connect()
    await submit(client, 2)
    # Leased, and never read.
    await worker.lease(2)
    await worker.send(leave=worker_pb2.Leave())
    other = FakeWorker(channel, "w2")
    await other.connect()
    again = await other.lease(2)
    assert {lease.attempt for lease in again} == {2}
    await other.finish(again)
    await other.receive("committed")
    # Nobody was lost: neither had to wait for a lease to run out, nor is a suspect.
    status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    assert [w.worker_id for w in status.workers] == ["w2"]


async def test_a_stream_that_ends_without_leave_keeps_its_leases(client, channel) -> None:
    worker = FakeWorker(channel)
    await worker.connect()
    await submit(client, 1)
    (lease,) = await worker.lease(1)
    await worker.call.done_writing()
    async with asyncio.timeout(10):
        assert await worker.call.read() is grpc.aio.EOF
    await worker.connect(holding=[lease])
    await worker.finish([lease])
    await worker.receive("committed")


async def test_a_failed_attempt_is_tried_again_and_then_final(client, channel) -> None:
    worker = FakeWorker(channel)
    await worker.connect()
    answer = await submit(client, 1)
    error = types_pb2.JobError(code=13, message="a broken kernel")
    for attempt in range(1, 4):
        (lease,) = await worker.lease(1)
        assert lease.attempt == attempt
        await worker.send(release=worker_pb2.Release(leases=refs([lease]), error=error))
    (end,) = await ends(client, answer.submission_id)
    assert (end.state, end.attempt) == (types_pb2.JOB_STATE_FAILED, 3)
    assert end.error == error


async def test_a_result_whose_beginning_was_lost_is_computed_again(
    client, channel, worker: FakeWorker, store: redis.asyncio.Redis
) -> None:
    """
    Given a result of which the first chunk is stored
    If a replica without that chunk takes over, and the second one comes
    I expect the worker to be told to drop the job, to be served on, and the job to end by its
    second attempt.
    """
    submitted = await submit(client, 1)
    (lease,) = await worker.lease(1)
    beginning = ended(lease.job_id, lease.attempt)
    beginning.chunk.ClearField("end")
    await worker.send(results=worker_pb2.Results(id=1, chunks=[beginning]))
    await worker.receive("committed")
    assert await store.delete(Keys()("chunks", lease.job_id, str(lease.attempt))) == 1
    await worker.finish([lease], number=2, message=2)
    (revoked,) = (await worker.receive("revoked")).revoked.leases
    assert (revoked.job_id, revoked.attempt) == (lease.job_id, 1)
    assert (await worker.receive("committed")).committed.id == 2
    (again,) = await worker.lease(1)
    assert (again.job_id, again.attempt) == (lease.job_id, 2)
    await worker.finish([again], message=3)
    await worker.receive("committed")
    (job,) = (await client.GetJobs(trace_pb2.GetJobsRequest(job_ids=submitted.job_ids))).jobs
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED


async def test_what_was_on_its_way_to_a_lost_connection_comes_at_once(
    client, channel: grpc.aio.Channel
) -> None:
    worker = FakeWorker(channel)
    await worker.connect()
    await submit(client, 2)
    received, _ = await worker.lease(2)
    worker.call.cancel()
    # It comes back, knowing of one of the two leases.
    await worker.connect(holding=[received])
    (again,) = await worker.lease(1)
    assert (again.attempt, again.job_id != received.job_id) == (2, True)


async def test_nothing_is_leased_before_the_first_heartbeat(client, channel) -> None:
    worker = FakeWorker(channel)
    await worker.greet()
    await submit(client, 1)
    await worker.send(ready=worker_pb2.Ready(jobs=1))
    # Another is served meanwhile, so the scheduler had its chance.
    other = FakeWorker(channel, "w2")
    await other.connect()
    assert await other.lease(1)


async def test_a_second_connection_of_a_worker_ends_the_first(client, channel) -> None:
    first = FakeWorker(channel)
    await first.connect()
    second = FakeWorker(channel)
    await second.connect()
    await submit(client, 1)
    await first.send(ready=worker_pb2.Ready(jobs=1))
    error = await refusal(first)
    assert error.code() is grpc.StatusCode.ABORTED
    assert await second.lease(1)


async def test_a_cancelled_job_is_taken_from_its_worker_at_once(
    client, channel, worker: FakeWorker
) -> None:
    answer = await submit(client, 2)
    leases = await worker.lease(1)
    request = trace_pb2.CancelJobsRequest(submission_id=answer.submission_id)
    assert (await client.CancelJobs(request)).cancelled == 2
    assert (await worker.receive("revoked")).revoked.leases == refs(leases)
    states = [end.state for end in await ends(client, answer.submission_id)]
    assert states == [types_pb2.JOB_STATE_CANCELLED] * 2
    assert (await client.CancelJobs(request)).cancelled == 0


async def test_a_job_past_its_timeout_fails_and_is_taken_from_its_worker(
    client, worker: FakeWorker
) -> None:
    spec = JobSpec(prompt="a", timeout=Duration(nanos=50_000_000))
    answer = await client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=[spec, spec]))
    leases = await worker.lease(1)
    late = await ends(client, answer.submission_id)
    assert [(end.state, end.error.code) for end in late] == [
        (types_pb2.JOB_STATE_FAILED, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    ] * 2
    assert (await worker.receive("revoked")).revoked.leases == refs(leases)


async def test_leases_say_their_priority(client, worker: FakeWorker) -> None:
    for priority in (types_pb2.PRIORITY_UNSPECIFIED, types_pb2.PRIORITY_BATCH):
        request = trace_pb2.SubmitJobsRequest(jobs=[JobSpec(prompt="a")], priority=priority)
        await client.SubmitJobs(request)
    # Room for one batch job takes four places: one of them is never batch.
    leases = await worker.lease(2)
    assert [lease.priority for lease in leases] == [
        types_pb2.PRIORITY_INTERACTIVE,
        types_pb2.PRIORITY_BATCH,
    ]


async def test_a_worker_that_leaves_in_order_is_forgotten(client, channel, worker) -> None:
    await worker.send(leave=worker_pb2.Leave())
    async with asyncio.timeout(10):
        assert await worker.call.read() is grpc.aio.EOF
    status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    assert not status.workers


async def test_status_shows_workers_queues_and_ends(client, channel, worker: FakeWorker) -> None:
    await submit(client, 4)
    leases = await worker.lease(2)
    await worker.finish(leases[:1])
    await worker.receive("committed")
    status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    (queue,) = status.queues
    assert (queue.model, queue.queued, queue.leased) == ("m", 2, 1)
    (shown,) = status.workers
    assert (shown.worker_id, shown.model, shown.leased) == ("w1", MODEL, 1)
    assert dict(status.ended) == {"SUCCEEDED": 1}
    assert status.redis_version
    assert status.redis_memory_bytes > 0


def bad_chunk(**changes: object) -> worker_pb2.WorkRequest:
    leased = ended("s-0", 1)
    for name, value in changes.items():
        setattr(leased.chunk, name, value)
    return worker_pb2.WorkRequest(results=worker_pb2.Results(chunks=[leased]))


FIRST = {
    "not a greeting": (worker_pb2.WorkRequest(ready=worker_pb2.Ready(jobs=1)), "hello"),
    "empty": (worker_pb2.WorkRequest(), "hello"),
    "no id": (worker_pb2.WorkRequest(hello=worker_pb2.Hello(model=MODEL)), "hello.worker_id"),
    "the reaper's name": (
        worker_pb2.WorkRequest(hello=worker_pb2.Hello(worker_id="reaper", model=MODEL)),
        "hello.worker_id",
    ),
    "no model": (
        worker_pb2.WorkRequest(hello=worker_pb2.Hello(worker_id="w")),
        "hello.model.name",
    ),
    "a device of another terminal": (
        worker_pb2.WorkRequest(
            hello=worker_pb2.Hello(worker_id="w", model=MODEL, device="\x1b[2J")
        ),
        "hello.device",
    ),
    "a long version": (
        worker_pb2.WorkRequest(
            hello=worker_pb2.Hello(worker_id="w", model=MODEL, version="1" * 257)
        ),
        "hello.version",
    ),
    "a name that changes its direction": (
        worker_pb2.WorkRequest(
            hello=worker_pb2.Hello(worker_id="w", model=types_pb2.ModelInfo(name="a\u202eb"))
        ),
        "hello.model.name",
    ),
    "a site of two lines": (
        worker_pb2.WorkRequest(
            hello=worker_pb2.Hello(
                worker_id="w",
                model=MODEL,
                further_models=[types_pb2.ModelInfo(name="n", sites=["resid", "a\nb"])],
            )
        ),
        "hello.further_models[0].sites",
    ),
    "many rules": (
        worker_pb2.WorkRequest(
            hello=worker_pb2.Hello(
                worker_id="w", model=types_pb2.ModelInfo(name="n", rules=["r"] * 257)
            )
        ),
        "hello.model.rules",
    ),
}
LATER = {
    "a second greeting": (worker_pb2.WorkRequest(hello=worker_pb2.Hello()), "hello"),
    "nothing": (worker_pb2.WorkRequest(), "message"),
    "no job id": (bad_chunk(job_id="x"), "results.chunks[0].chunk.job_id"),
    "chunk 0": (bad_chunk(number=0), "results.chunks[0].chunk.number"),
}


async def refusal(worker: FakeWorker) -> grpc.aio.AioRpcError:
    """Read until the scheduler ends the stream with an error."""
    async with asyncio.timeout(10):
        while True:
            try:
                response = await worker.call.read()
            except grpc.aio.AioRpcError as error:
                return error
            assert response is not grpc.aio.EOF, "the stream ended without an error"


@pytest.mark.parametrize("name", FIRST)
async def test_a_worker_must_greet(channel: grpc.aio.Channel, name: str) -> None:
    request, field = FIRST[name]
    worker = FakeWorker(channel)
    worker.call = worker_pb2_grpc.WorkerServiceStub(channel).Work()
    await worker.call.write(request)
    error = await refusal(worker)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}:")


@pytest.mark.parametrize("name", LATER)
async def test_a_malformed_message_ends_the_stream(
    client, channel, worker: FakeWorker, name: str
) -> None:
    request, field = LATER[name]
    await worker.call.write(request)
    error = await refusal(worker)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}:")
    # The scheduler and other workers live on.
    await submit(client, 1)
    other = FakeWorker(channel, "w2")
    await other.connect()
    assert len(await other.lease(1)) == 1


@pytest.mark.parametrize(
    ("draft", "field"),
    [
        (types_pb2.Draft(job_id="nonsense"), "drafts.drafts[1].job_id"),
        (types_pb2.Draft(job_id="s-0", text="x"), "drafts.drafts[1].token_ids"),
        (
            types_pb2.Draft(job_id="s-0", first=1024, token_ids=[1], tokens=["a"]),
            "drafts.drafts[1].token_ids",
        ),
        (
            types_pb2.Draft(job_id="s-0", first=2**32 - 1, token_ids=[1], tokens=["a"]),
            "drafts.drafts[1].token_ids",
        ),
        (types_pb2.Draft(job_id="s-0", token_ids=[1, 2], tokens=["a"]), "drafts.drafts[1].tokens"),
        (
            types_pb2.Draft(job_id="s-0", token_ids=[1], tokens=["a"], text="x" * 300_000),
            "drafts.drafts[1]:",
        ),
    ],
)
async def test_a_draft_that_is_malformed_ends_the_stream(
    worker: FakeWorker, draft: types_pb2.Draft, field: str
) -> None:
    good = types_pb2.Draft(job_id="s-0", attempt=1, token_ids=[1], tokens=["a"])
    await worker.send(drafts=worker_pb2.Drafts(drafts=[good, draft]))
    async with asyncio.timeout(10):
        assert await worker.call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in await worker.call.details()
