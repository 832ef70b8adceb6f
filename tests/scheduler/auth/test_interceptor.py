"""Every RPC, with every kind of caller."""

import asyncio
import gc
import json
import os
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import redis
import structlog
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from reltrace_proto.telemetry import LogFormat, configure_logs
from reltrace_proto.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
    types_pb2,
    worker_pb2,
)
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.rates import RateLimiter, Rates
from reltrace_scheduler.auth.tokens import Tokens, append, make, parse
from reltrace_scheduler.limits import MAX_REQUEST_BYTES, MAX_SUBMISSION_BYTES
from scheduler.auth.conftest import Serve
from scheduler.fake_worker import FakeWorker

DEADLINE = 10

SERVICES = {
    "client": trace_pb2.DESCRIPTOR.services_by_name["TraceService"],
    "worker": worker_pb2.DESCRIPTOR.services_by_name["WorkerService"],
    "operator": admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
}
METHODS = {
    f"/{service.full_name}/{method.name}": role
    for role, service in SERVICES.items()
    for method in service.methods
}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def status_of(
    channel: grpc.aio.Channel,
    method: str,
    metadata: tuple[tuple[str, str], ...],
    request: bytes = b"",
) -> tuple[grpc.StatusCode, str]:
    """Call a method with an empty message, whatever its shape."""
    # On the wire this is a stream of one message too. As one, grpc's asyncio client can
    # say INTERNAL itself where the server answers before it has read.
    call = channel.unary_stream(method)(request, metadata=metadata, timeout=DEADLINE)
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details())
    return await call.code(), str(await call.details())


REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


async def test_every_method_asks_for_the_role_of_its_service(
    serve: Serve, token_file: Path, tokens: dict[str, str]
) -> None:
    async with (
        serve(Access(Tokens(token_file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        for method, needed in METHODS.items():
            for role, token in tokens.items():
                code, said = await status_of(channel, method, bearer(token))
                may = role == needed or (role, needed) == ("operator", "client")
                assert (code not in REFUSALS) == may, (method, role, code, said)
                if not may:
                    assert code is grpc.StatusCode.PERMISSION_DENIED
                    assert f"needs a token of the role {needed}" in said
                    assert f"has the role {role}" in said


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ((), "asks for a token: set RELTRACE_TOKEN"),
        (bearer("rlt_wrong"), "not known here"),
        (bearer(""), "not one `Bearer TOKEN`"),
        (bearer("x" * 600), "not one `Bearer TOKEN`"),
        ((("authorization", "Basic abc"),), "not one `Bearer TOKEN`"),
        (bearer("a") + bearer("b"), "not one `Bearer TOKEN`"),
    ],
)
async def test_without_a_token_that_holds_no_method_answers(
    serve: Serve,
    token_file: Path,
    tokens: dict[str, str],
    metadata: tuple[tuple[str, str], ...],
    said: str,
) -> None:
    async with (
        serve(Access(Tokens(token_file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        for method in METHODS:
            code, details = await status_of(channel, method, metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert said in details
        # What watches the service needs no token.
        health = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=DEADLINE
        )
        assert health.status


async def test_a_refused_message_is_neither_read_nor_parsed(
    serve: Serve, token_file: Path, tokens: dict[str, str]
) -> None:
    async with (
        serve(Access(Tokens(token_file))) as address,
        grpc.aio.insecure_channel(
            address, options=[("grpc.max_send_message_length", -1)]
        ) as channel,
    ):
        # Neither its length nor its bytes are what it fails for.
        for garbage in (b"\xff" * 100, b"\xff" * (100 << 20)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/reltrace.v1.TraceService/SubmitJobs")(
                    garbage, timeout=DEADLINE
                )
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_job_goes_its_way_with_tokens(
    serve: Serve, token_file: Path, tokens: dict[str, str]
) -> None:
    async with (
        serve(Access(Tokens(token_file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(channel, metadata=bearer(tokens["worker"]))
        await worker.connect()
        client = trace_pb2_grpc.TraceServiceStub(channel)
        metadata = bearer(tokens["client"])
        submission = await client.SubmitJobs(
            trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")]),
            metadata=metadata,
            timeout=DEADLINE,
        )
        await worker.finish(await worker.lease(1))
        stream = client.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=submission.submission_id),
            metadata=metadata,
            timeout=DEADLINE,
        )
        events = [event async for message in stream for event in message.events]
        assert [event.chunk.end.state for event in events] == [types_pb2.JOB_STATE_SUCCEEDED]


async def test_a_withdrawn_token_ends_its_open_streams(
    serve: Serve, token_file: Path, tokens: dict[str, str]
) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    async with (
        serve(Access(Tokens(token_file, clock))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(channel, metadata=bearer(tokens["worker"]))
        await worker.connect()
        client = trace_pb2_grpc.TraceServiceStub(channel)

        async def submit() -> None:
            await client.SubmitJobs(
                trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")]),
                metadata=bearer(tokens["client"]),
                timeout=DEADLINE,
            )

        # A change that leaves the token alone leaves the stream alone.
        token_file.write_text(token_file.read_text() + "\n# reviewed\n")
        clock.now += 2
        await submit()
        assert len(await worker.lease(1)) == 1

        kept = [e.to_toml() for e in parse(token_file.read_text()) if e.name != "worker"]
        token_file.write_text("\n".join(kept))
        clock.now += 2
        await submit()
        await worker.send(ready=worker_pb2.Ready(jobs=1))
        with pytest.raises(grpc.aio.AioRpcError, match="was withdrawn"):
            async with asyncio.timeout(DEADLINE):
                await worker.call.read()
        assert await worker.call.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("how", ["expired", "withdrawn"])
async def test_a_stream_without_messages_ends_soon_after_its_token_is_not_valid(
    serve: Serve, token_file: Path, tokens: dict[str, str], how: str
) -> None:
    """
    Given a worker and a reader whose streams are silent, and tokens that end
    I expect both streams to end within some seconds.
    """
    expires = datetime.now(UTC) + timedelta(seconds=1) if how == "expired" else None
    short = {}
    for role in (Role.WORKER, Role.CLIENT):
        short[role], entry = make(f"short-{role}", role, expires=expires)
        append(token_file, entry)
    async with (
        serve(Access(Tokens(token_file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(channel, metadata=bearer(short[Role.WORKER]))
        await worker.connect()
        client = trace_pb2_grpc.TraceServiceStub(channel)
        submission = await client.SubmitJobs(
            trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")]),
            metadata=bearer(tokens["client"]),
            timeout=DEADLINE,
        )
        stream = client.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=submission.submission_id),
            metadata=bearer(short[Role.CLIENT]),
        )
        if how == "withdrawn":
            kept = [e for e in parse(token_file.read_text()) if not e.name.startswith("short")]
            token_file.write_text("\n".join(entry.to_toml() for entry in kept))
        for call in (worker.call, stream):
            with pytest.raises(grpc.aio.AioRpcError, match=how) as caught:
                async with asyncio.timeout(3 * DEADLINE):
                    await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_refused_calls_leave_nothing_behind(
    serve: Serve, token_file: Path, tokens: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Given 2,000 calls without a token to methods of 4 KB names
    I expect memory to stay as it is, and a few short lines in the log.
    """
    configure_logs("info", LogFormat.JSON)

    async def call(number: int) -> None:
        method = f"/reltrace.x/{number:08d}{'x' * 4000}"
        assert (await status_of(channel, method, ()))[0] is grpc.StatusCode.UNAUTHENTICATED

    async with (
        serve(Access(Tokens(token_file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        await asyncio.gather(*(call(number) for number in range(100)))
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        try:
            for start in range(0, 2000, 100):
                await asyncio.gather(*(call(number) for number in range(start, start + 100)))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    structlog.reset_defaults()
    # 2,000 names would be 8 MB.
    assert grown < 2 << 20
    lines = [line for line in capsys.readouterr().err.splitlines() if "call.refused" in line]
    assert 1 < len(lines) < 1000
    assert max(map(len, lines)) < 500
    assert sum(json.loads(line)["unlogged_before"] + 1 for line in lines) <= 2100


async def refused(call: Any) -> tuple[str, float]:
    """Return what is said, and the seconds to wait."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    return str(caught.value.details()), retry.retry_delay.ToTimedelta().total_seconds()


async def test_too_many_requests_of_one_identity(
    serve: Serve, token_file: Path, tokens: dict[str, str]
) -> None:
    access = Access(Tokens(token_file), rates=Rates(requests=0.01))
    async with serve(access) as address, grpc.aio.insecure_channel(address) as channel:
        client = trace_pb2_grpc.TraceServiceStub(channel)
        request = trace_pb2.ListModelsRequest()
        metadata = bearer(tokens["client"])
        await client.ListModels(request, metadata=metadata, timeout=DEADLINE)
        said, wait = await refused(client.ListModels(request, metadata=metadata, timeout=DEADLINE))
        assert "'client' sends requests faster" in said
        assert 90 < wait <= 100
        # Others are not held up.
        await client.ListModels(request, metadata=bearer(tokens["operator"]), timeout=DEADLINE)


async def test_too_many_jobs_of_one_identity(serve: Serve) -> None:
    async with (
        serve(Access(rates=Rates(jobs=1.0))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        await FakeWorker(channel).connect()
        client = trace_pb2_grpc.TraceServiceStub(channel)
        request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")] * 40)
        submission = await client.SubmitJobs(request, timeout=DEADLINE)
        said, wait = await refused(client.SubmitJobs(request, timeout=DEADLINE))
        assert "sends jobs faster" in said
        assert 30 < wait <= 40
        # Only submissions count.
        jobs = trace_pb2.GetJobsRequest(job_ids=submission.job_ids)
        assert len((await client.GetJobs(jobs, timeout=DEADLINE)).jobs) == 40


async def test_while_redis_is_away_nothing_passes_a_rate(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a rate that can not be counted, I expect "try again", as for every other call."""

    async def away(*arguments: object) -> None:
        raise redis.exceptions.ConnectionError("gone")

    monkeypatch.setattr(RateLimiter, "take", away)
    access = Access(rates=Rates(requests=1.0))
    async with serve(access) as address, grpc.aio.insecure_channel(address) as channel:
        client = trace_pb2_grpc.TraceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="try again") as caught:
            await client.ListModels(trace_pb2.ListModelsRequest(), timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_is_too_long_is_refused_before_it_is_parsed(serve: Serve) -> None:
    async with (
        serve(Access()) as address,
        grpc.aio.insecure_channel(
            address, options=[("grpc.max_send_message_length", -1)]
        ) as channel,
    ):
        for service in ("client", "operator"):
            for method in (m for m, role in METHODS.items() if role == service):
                is_submission = method.endswith("/SubmitJobs")
                most = MAX_SUBMISSION_BYTES if is_submission else MAX_REQUEST_BYTES
                code, said = await status_of(channel, method, (), b"\xff" * (most + 1))
                # No such message parses: its length is looked at first.
                assert (code, f"at most {most} are allowed" in said) == (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    True,
                ), method
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/reltrace.v1.TraceService/SubmitJobs")(
                b"\0" * (65 << 20), timeout=DEADLINE
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_compressed_message_is_not_unpacked(serve: Serve) -> None:
    # 192 MiB of zeros are 0.2 MiB of gzip. They are made in a process of their own, whose memory
    # does not count here.
    async with serve(Access()) as address:
        before = psutil.Process().memory_info().rss
        sender = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _BOMB, address),
            env=os.environ | {"GRPC_VERBOSITY": "NONE"},
            stdout=asyncio.subprocess.PIPE,
        )
        peak = before
        answer = asyncio.create_task(sender.communicate())
        while not answer.done():
            await asyncio.wait({answer}, timeout=0.01)
            peak = max(peak, psutil.Process().memory_info().rss)
        assert b"UNIMPLEMENTED" in answer.result()[0]
        assert peak - before < 64 << 20


_BOMB = """
import sys, grpc
with grpc.insecure_channel(sys.argv[1], options=[("grpc.max_send_message_length", -1)]) as channel:
    try:
        channel.unary_unary("/reltrace.v1.TraceService/SubmitJobs")(
            b"\\0" * (192 << 20), compression=grpc.Compression.Gzip, timeout=60
        )
    except grpc.RpcError as error:
        print(error.code().name)
"""


async def test_without_a_token_file_everybody_on_this_machine_may_do_everything(
    serve: Serve,
) -> None:
    async with serve(Access()) as address, grpc.aio.insecure_channel(address) as channel:
        status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
            admin_pb2.GetStatusRequest(), metadata=bearer("whatever"), timeout=DEADLINE
        )
        assert status.redis_version
