"""Bounds on streams, calls and connections: one caller does not take what is for all."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
import redis.asyncio
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc
from reltrace_scheduler.api import interceptor, trace
from reltrace_scheduler.api import server as server_module
from reltrace_scheduler.auth import rates
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.rates import Pacer
from reltrace_scheduler.auth.tokens import Tokens, append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import SchedulerError, TooFastError
from reltrace_scheduler.limits import MAX_PUBLIC_STREAMS
from reltrace_scheduler.queue.connection import Connection
from reltrace_scheduler.queue.results import Results
from scheduler.fake_worker import FakeWorker
from scheduler.trace_calls import JobSpec, details, submission

Metadata = tuple[tuple[str, str], ...]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def callers(tmp_path: Path) -> dict[str, Metadata]:
    """What two clients of a tenant, one of another and a worker present."""
    found = {}
    for name, role in (
        ("a", Role.CLIENT),
        ("b", Role.CLIENT),
        ("c", Role.CLIENT),
        ("w", Role.WORKER),
    ):
        token, entry = make(name, role, "other" if name == "c" else "default")
        append(tmp_path / "tokens.toml", entry)
        found[name] = (("authorization", f"Bearer {token}"),)
    return found


@pytest.fixture
async def guarded(
    callers: dict[str, Metadata],
    tmp_path: Path,
    store: redis.asyncio.Redis,
    settings: Settings,
    stack: AsyncExitStack,
) -> grpc.aio.Channel:
    """A channel to a scheduler that asks for tokens."""
    access = Access(Tokens(tmp_path / "tokens.toml"))
    serving = server_module.serving(Connection(store, "test"), settings, access)
    address = await stack.enter_async_context(serving)
    return await stack.enter_async_context(grpc.aio.insecure_channel(address))


@pytest.fixture
def three_streams_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "MAX_STREAMS_OF_CALLER", 3)


@pytest.fixture
def three_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONCURRENT_CALLS", 3)


@pytest.fixture
def short_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"grpc.server_handshake_timeout_ms": 300}
    options = tuple((name, small.pop(name, value)) for name, value in server_module._OPTIONS)
    assert not small
    monkeypatch.setattr(server_module, "_OPTIONS", options)


async def is_open(call: grpc.aio.UnaryStreamCall) -> bool:
    """Return whether a stream without messages was taken in, and not refused."""
    # The status comes in a task of its own: who cancels a read ends the stream.
    await asyncio.wait([asyncio.ensure_future(call.code())], timeout=0.3)
    return not call.done()


async def test_watches_of_strangers_are_bounded(channel: grpc.aio.Channel) -> None:
    """
    Given as many watches of the health as there may be
    I expect a further one to be refused, checks to be answered, and room again when one ends.
    """
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    watches = [health.Watch(request) for _ in range(MAX_PUBLIC_STREAMS)]
    async with asyncio.timeout(20):
        for watch in watches:
            assert (await watch.read()).status
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Watch(request).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await health.Check(request)).status
        watches[0].cancel()
        while True:
            try:
                assert (await health.Watch(request).read()).status
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)


@pytest.mark.usefixtures("three_streams_each")
async def test_streams_of_a_caller_are_bounded(
    callers: dict[str, Metadata], guarded: grpc.aio.Channel
) -> None:
    """
    Given a caller that has as many streams open as it may
    I expect a further one to be refused with a delay, and those of others to be taken.
    """
    await FakeWorker(guarded, metadata=callers["w"]).connect()
    client = trace_pb2_grpc.TraceServiceStub(guarded)
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a")), metadata=callers["a"])
    results = trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)

    def stream(name: str) -> grpc.aio.UnaryStreamCall:
        return client.StreamResults(results, metadata=callers[name])

    streams = [stream("a") for _ in range(3)]
    assert all([await is_open(each) for each in streams])
    with pytest.raises(grpc.aio.AioRpcError, match="'a' has 3 streams open") as refused:
        await stream("a").read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (retry,) = details(refused.value, RetryInfo)
    assert retry.retry_delay.seconds == 1
    assert await is_open(stream("b"))
    streams[0].cancel()
    async with asyncio.timeout(10):
        while not await is_open(stream("a")):
            pass


@pytest.mark.usefixtures("three_calls")
async def test_calls_at_a_time_are_bounded(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
    for watch in watches:
        assert (await watch.read()).status
    client = trace_pb2_grpc.TraceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError, match="Concurrent RPC limit") as refused:
        await client.ListModels(trace_pb2.ListModelsRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.usefixtures("short_handshake")
async def test_who_connects_and_says_nothing_is_sent_away(server: str) -> None:
    host, _, port = server.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(10):
        # What a server says first, and then the end.
        assert len(await reader.read()) < 1000
    writer.close()


async def test_a_stream_that_waits_for_long_asks_ever_less(
    monkeypatch: pytest.MonkeyPatch, client, worker: FakeWorker
) -> None:
    """
    Given a stream of results whose job does not end
    I expect few looks at the store, and the result as soon as it is there.
    """
    monkeypatch.setattr(trace, "_POLL", 0.05)
    looks, progress = 0, Results.progress

    async def counting(self: Results, submission: str) -> object:
        nonlocal looks
        looks += 1
        return await progress(self, submission)

    monkeypatch.setattr(Results, "progress", counting)
    answer = await client.SubmitJobs(submission(JobSpec(prompt="a")))
    stream = client.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=answer.submission_id)
    )
    reading = asyncio.ensure_future(stream.read())
    await asyncio.wait([reading], timeout=1.5)
    assert not reading.done()
    # 0.05, 0.1, 0.2, 0.4, 0.8 seconds, each with jitter down to a half.
    assert looks <= 8
    leases = await worker.lease(1)
    await worker.finish(leases)
    async with asyncio.timeout(2):
        assert (await reading).events


async def test_a_caller_in_a_loop_is_slowed_down(
    monkeypatch: pytest.MonkeyPatch, callers: dict[str, Metadata], guarded: grpc.aio.Channel
) -> None:
    """
    Given a caller that makes forty calls at a time, over and over, where 50 a second are its pace
    I expect no more of them to be answered than a burst and the pace, and none to be refused,
    while another caller's are answered at once.
    """
    monkeypatch.setattr(rates, "_PACE", 50.0)
    client = trace_pb2_grpc.TraceServiceStub(guarded)
    answered = 0

    async def call(name: str) -> None:
        await client.ListModels(trace_pb2.ListModelsRequest(), metadata=callers[name], timeout=20)

    async def loop() -> None:
        nonlocal answered
        while True:
            await call("a")
            answered += 1

    clock = asyncio.get_running_loop().time
    began = clock()
    looping = [asyncio.create_task(loop()) for _ in range(40)]
    others = 0
    while clock() - began < 2:
        await call("b")
        others += 1
        await asyncio.sleep(0.05)
    seconds = clock() - began
    assert not [task for task in looping if task.done()]
    for task in looping:
        task.cancel()
    assert answered <= 50 * (2 + seconds) + 1
    assert others > 5


async def test_of_very_many_calls_the_last_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_PACE", 10.0)
    pacer = Pacer()
    calls = [asyncio.create_task(pacer.wait("a")) for _ in range(100)]
    await asyncio.sleep(0)
    refused = [task for task in calls if task.done() and isinstance(task.exception(), TooFastError)]
    # A burst of 20 at once; 21 wait for up to two seconds.
    assert len(refused) == 100 - 41
    await pacer.wait("b")
    for task in calls:
        task.cancel()


SUBMIT = "/reltrace.v1.TraceService/SubmitJobs"


@pytest.fixture
def two_submissions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two submissions at a time, and one of a tenant."""
    monkeypatch.setattr(interceptor, "MAX_SUBMISSIONS_AT_A_TIME", 2)
    monkeypatch.setattr(interceptor, "MAX_SUBMISSIONS_OF_TENANT", 1)


@pytest.mark.usefixtures("two_submissions")
async def test_submissions_are_read_when_it_is_their_turn(
    callers: dict[str, Metadata], guarded: grpc.aio.Channel
) -> None:
    """
    Given a caller that begins a submission, and does not send it
    I expect the next one of its tenant to wait until that is over, and another's to be accepted.
    """
    await FakeWorker(guarded, metadata=callers["w"]).connect()
    client = trace_pb2_grpc.TraceServiceStub(guarded)
    request = submission(JobSpec(prompt="a"))
    slow = guarded.stream_unary(SUBMIT)(metadata=callers["a"])
    await slow.wait_for_connection()
    waiting = client.SubmitJobs(request, metadata=callers["b"], timeout=20)
    assert (await client.SubmitJobs(request, metadata=callers["c"], timeout=20)).job_ids
    assert not waiting.done()
    slow.cancel()
    assert (await waiting).job_ids


async def test_a_health_check_that_does_not_come_is_given_up(
    monkeypatch: pytest.MonkeyPatch, channel: grpc.aio.Channel
) -> None:
    """It needs no token, and calls are bounded."""
    monkeypatch.setattr(interceptor, "_PUBLIC_READ_DEADLINE", 0.2)
    slow = channel.stream_unary("/grpc.health.v1.Health/Check")(timeout=20)
    with pytest.raises(grpc.aio.AioRpcError, match="request: did not come within"):
        await slow
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="x"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_submission_that_does_not_come_is_given_up(
    monkeypatch: pytest.MonkeyPatch, channel: grpc.aio.Channel
) -> None:
    monkeypatch.setattr(interceptor, "_READ_DEADLINE", 0.2)
    slow = channel.stream_unary(SUBMIT)(timeout=20)
    with pytest.raises(grpc.aio.AioRpcError, match="request: did not come within") as refused:
        await slow
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    empty = channel.stream_unary(SUBMIT)(timeout=20)
    await empty.done_writing()
    with pytest.raises(grpc.aio.AioRpcError, match="request: is missing"):
        await empty


@pytest.mark.parametrize("method", ["SubmitJobs", "StreamResults"])
async def test_a_refused_call_leaves_nothing_behind(
    channel: grpc.aio.Channel, worker: FakeWorker, method: str
) -> None:
    """
    Given calls that are refused
    I expect no error to be kept until the next collection of garbage, with the frames that it went
    through and the request in them.
    """
    requests = {
        "SubmitJobs": submission(JobSpec(prompt="a", rule="x")),
        "StreamResults": trace_pb2.StreamResultsRequest(submission_id="nope"),
    }
    call = channel.unary_stream(f"/reltrace.v1.TraceService/{method}")
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            with pytest.raises(grpc.aio.AioRpcError, match=r"x|nope"):
                await call(requests[method].SerializeToString()).read()
        # The last ones may be on their way.
        async with asyncio.timeout(10):
            while kept_errors() > 5:
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


def kept_errors() -> int:
    # Not by isinstance(): it asks objects of other packages, some of which warn.
    kinds = (SchedulerError, grpc.aio.AbortError)
    return sum(issubclass(type(found), kinds) for found in gc.get_objects())
