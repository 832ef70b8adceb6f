"""Whatever is sent, the answer is a status that says why, and nobody else notices."""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import pytest
import redis.asyncio
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from reltrace_proto.v1 import admin_pb2, trace_pb2, types_pb2, worker_pb2
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from scheduler.fake_worker import FakeWorker
from scheduler.messages import messages

UNARY = {
    f"/reltrace.v1.{service.name}/{method.name}": method
    for file in (trace_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
WORK = "/reltrace.v1.WorkerService/Work"
WORK_ENDS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    # Another session has taken the worker's name.
    grpc.StatusCode.ABORTED,
}

NAMES_WHAT_MAY_NOT_BE = {
    "SubmitJobs", "StreamResults", "CancelJobs", "DrainWorkers", "ForgetModels",
    "RequeueQuarantinedJobs",
}  # fmt: skip
"""Methods that may answer NOT_FOUND."""


def answers(path: str) -> set[grpc.StatusCode]:
    """Return how a call of a method may end: INTERNAL and UNKNOWN are faults of ours.

    The queue has room for all that is sent here.
    """
    known = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    if path.rpartition("/")[2] in NAMES_WHAT_MAY_NOT_BE:
        known.add(grpc.StatusCode.NOT_FOUND)
    return known


WORDS = st.one_of(
    st.sampled_from(
        ["", "m", "resid", "embed", "token", "attnlrp", "s-0", "-", "a-b-1", "x" * 300]
    ),
    st.text(max_size=20),
)

fuzz = examples(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    # The server is one for all examples: that it lives on is what is tested.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def settings() -> Settings:
    # No lease runs out here, however busy the machine.
    return Settings(listen="127.0.0.1:0", lease=60, max_jobs=500)


async def answer(
    channel: grpc.aio.Channel, path: str, request: bytes, *also: grpc.StatusCode
) -> grpc.StatusCode:
    """Call a method with raw bytes; return how it ended: as `answers` says, or as `also` does."""
    if path.endswith("StreamResults"):
        call: Any = channel.unary_stream(path)(request, timeout=20)
    else:
        call = channel.unary_unary(path)(request, timeout=20)
    code = await call.code()
    details = await call.details() or ""
    assert code in answers(path) | set(also), f"{code}: {details}"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        assert ":" in details, f"no field is named: {details}"
    assert len(details) < 10_000
    return code


async def still_works(channel: grpc.aio.Channel, worker: FakeWorker) -> None:
    """An honest client's job is served to the end."""
    submit = channel.unary_unary(
        "/reltrace.v1.TraceService/SubmitJobs",
        trace_pb2.SubmitJobsRequest.SerializeToString,
        trace_pb2.SubmitJobsResponse.FromString,
    )
    accepted = await submit(
        trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="honest", model="m")])
    )
    served: list[str] = []
    while accepted.job_ids[0] not in served:
        leases = await worker.lease(1)
        await worker.finish(leases)
        await worker.receive("committed")
        served += [lease.job_id for lease in leases]
    events = channel.unary_stream(
        "/reltrace.v1.TraceService/StreamResults",
        trace_pb2.StreamResultsRequest.SerializeToString,
        trace_pb2.StreamResultsResponse.FromString,
    )(trace_pb2.StreamResultsRequest(submission_id=accepted.submission_id), timeout=20)
    ended = [event.chunk.job_id async for message in events for event in message.events]
    assert ended == accepted.job_ids


@pytest.mark.parametrize("path", UNARY)
async def test_any_request_gets_an_answer(
    channel: grpc.aio.Channel, worker: FakeWorker, path: str
) -> None:
    @fuzz
    @given(request=messages(UNARY[path].input_type, WORDS))
    def run(request: Any) -> None:
        sent.append(request.SerializeToString())

    sent: list[bytes] = []
    await asyncio.to_thread(run)
    for request in sent:
        await answer(channel, path, request)
    await still_works(channel, worker)


@pytest.mark.parametrize("path", UNARY)
async def test_any_bytes_get_an_answer(
    channel: grpc.aio.Channel, worker: FakeWorker, path: str
) -> None:
    @fuzz
    @given(st.binary(max_size=200))
    def run(data: bytes) -> None:
        sent.append(data)

    sent: list[bytes] = []
    await asyncio.to_thread(run)
    request_type = GetMessageClass(UNARY[path].input_type)
    for request in sent:
        code = await answer(channel, path, request)
        try:
            request_type.FromString(request)
        except DecodeError:
            assert code is grpc.StatusCode.INVALID_ARGUMENT, request
    await still_works(channel, worker)


def send_all(address: str, requests: list[bytes]) -> None:
    """Send messages on a worker's stream, close it, and read what comes.

    grpc's asyncio client says INTERNAL itself where the server ends a stream that is being
    written to; the one without asyncio gives the server's status.
    """
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.stream_stream(WORK)(iter(requests), timeout=20)
        # The scheduler ends the stream at the first message that it does not take.
        with suppress(grpc.RpcError):
            for _ in call:
                pass
        assert call.code() in WORK_ENDS, call.details()


async def test_any_messages_of_a_worker_leave_the_leases_of_others(
    server: str, client: Any, worker: FakeWorker
) -> None:
    """
    Given an honest worker with a lease, and a stream of anything that knows of it
    I expect the lease, and the stored result, to be the honest worker's.
    """
    hello = worker_pb2.WorkRequest(
        hello=worker_pb2.Hello(worker_id="fuzz", model=types_pb2.ModelInfo(name="m"))
    ).SerializeToString()
    request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="honest")])
    submission = await client.SubmitJobs(request)
    (lease,) = await worker.lease(1)
    words = st.one_of(WORDS, st.just(lease.job_id))

    @fuzz
    @given(st.lists(messages(worker_pb2.WorkRequest.DESCRIPTOR, words), max_size=6), st.booleans())
    def run(requests: list[Any], greets: bool) -> None:
        bodies = [request.SerializeToString() for request in requests]
        sent.append([hello, *bodies] if greets else bodies)

    sent: list[list[bytes]] = []
    await asyncio.to_thread(run)
    for requests in sent:
        await asyncio.to_thread(send_all, server, requests)
    await worker.finish([lease], data=b"honest")
    await worker.receive("committed")
    stream = client.StreamResults(
        trace_pb2.StreamResultsRequest(submission_id=submission.submission_id), timeout=20
    )
    (event,) = [event async for message in stream for event in message.events]
    assert (event.chunk.job_id, event.chunk.end.attempt) == (lease.job_id, 1)


@pytest.mark.parametrize("path", UNARY)
async def test_an_oversized_request_is_refused_and_says_so(
    channel: grpc.aio.Channel, worker: FakeWorker, path: str
) -> None:
    # An unknown field of 17 MiB: a valid message of any type.
    body = bytes(17 << 20)
    data = b"\xfa\x3f" + _varint(len(body)) + body
    assert await answer(channel, path, data) is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await channel.unary_unary(path)(bytes(65 << 20), timeout=20)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await still_works(channel, worker)


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


async def test_fuzzing_leaves_the_counters_right(
    channel: grpc.aio.Channel, client: Any, worker: FakeWorker, store: redis.asyncio.Redis
) -> None:
    """What is queued, stored and counted agrees, whatever was submitted and cancelled."""

    @fuzz
    @given(
        st.lists(
            messages(
                types_pb2.JobSpec.DESCRIPTOR,
                st.sampled_from(["m", "resid", "embed", "token", "attnlrp", "prompt"]),
            ),
            min_size=1,
            max_size=3,
        ),
        st.booleans(),
    )
    def run(specs: list[Any], cancel: bool) -> None:
        sent.append((specs, cancel))

    sent: list[tuple[list[Any], bool]] = []
    await asyncio.to_thread(run)
    sent.append(([types_pb2.JobSpec(prompt="good")], True))
    sent.append(([types_pb2.JobSpec(prompt="good")] * 2, False))
    accepted, refused = 0, []
    for specs, cancel in sent:
        try:
            answer = await client.SubmitJobs(trace_pb2.SubmitJobsRequest(jobs=specs))
        except grpc.aio.AioRpcError as error:
            refused.append(error.code())
            continue
        if cancel:
            await client.CancelJobs(trace_pb2.CancelJobsRequest(submission_id=answer.submission_id))
        else:
            accepted += len(specs)
    assert accepted >= 2
    assert set(refused) <= answers("SubmitJobs")
    load = await store.hgetall(Keys()("load"))
    # Jobs with a timeout may have ended by themselves.
    open_jobs = [
        key
        for key in await store.keys("*job:*")
        if await store.hget(key, "state") in (b"QUEUED", b"LEASED")
    ]
    assert int(load[b"jobs"]) == len(open_jobs)
    specs = [int(await store.hget(key, "bytes")) for key in open_jobs]
    assert int(load[b"bytes"]) == sum(specs)
