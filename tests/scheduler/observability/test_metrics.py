"""What Prometheus reads, over HTTP, of a scheduler that serves."""

import asyncio
import re
import socket
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families
from reltrace_proto.net import SettingError
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2, worker_pb2
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.tokens import Tokens, append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.connection import Connection
from scheduler.fake_worker import FakeWorker

README = Path(__file__).parents[3] / "scheduler" / "README.md"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Exported:
    """A scheduler with its metrics."""

    def __init__(self, channel: grpc.aio.Channel, port: int) -> None:
        self.traces = trace_pb2_grpc.TraceServiceStub(channel)
        self.worker = FakeWorker(channel)
        self._url = f"http://127.0.0.1:{port}/metrics"

    async def text(self) -> str:
        def read() -> str:
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                return str(answer.read().decode())

        return await asyncio.to_thread(read)

    async def samples(self) -> Samples:
        families = text_string_to_metric_families(await self.text())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    async def value(self, name: str, **labels: str) -> float | None:
        return (await self.samples()).get((name, frozenset(labels.items())))

    async def wait(self, name: str, wanted: float, **labels: str) -> None:
        async with asyncio.timeout(10):
            while (seen := await self.value(name, **labels)) != wanted:
                await asyncio.sleep(0.02)
        assert seen == wanted


@pytest.fixture
async def exported(
    store: redis.asyncio.Redis,
    redis_url: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Exported]:
    monkeypatch.setattr("reltrace_scheduler.observability.metrics._PERIOD", 0.05)
    client = redis.asyncio.Redis.from_url(redis_url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connection = Connection(client, "test")
    async with (
        serving(connection, replace(settings, metrics=f"127.0.0.1:{port}")) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Exported(channel, port)
    await client.aclose()


def submission(count: int, priority: int = 0) -> trace_pb2.SubmitJobsRequest:
    jobs = [types_pb2.JobSpec(prompt=f"p {number}") for number in range(count)]
    return trace_pb2.SubmitJobsRequest(jobs=jobs, priority=priority)


async def test_the_way_of_jobs(exported: Exported) -> None:
    """
    Given five jobs, of which two are leased and one ends
    I expect every step to be counted, and the rest in the queue.
    """
    await exported.worker.connect()
    await exported.traces.SubmitJobs(submission(5, types_pb2.PRIORITY_BATCH))
    leases = await exported.worker.lease(2)
    await exported.worker.finish(leases[:1], b"data")
    where = {"model": "m", "tenant": "default", "priority": "batch"}
    await exported.wait("reltrace_queue_jobs", 3, **where)
    await exported.wait("reltrace_leased_jobs", 1, **where)
    await exported.wait("reltrace_cluster_jobs_ended_total", 1, state="succeeded")
    samples = await exported.samples()
    found = {name: value for (name, _), value in samples.items()}
    assert found["reltrace_queue_oldest_seconds"] > 0
    assert found["reltrace_jobs_submitted_total"] == 5
    assert found["reltrace_leases_total"] == 2
    assert found["reltrace_jobs_ended_total"] == 1
    assert found["reltrace_result_bytes_total"] >= 4
    assert found["reltrace_workers"] == 1
    assert found["reltrace_redis_up"] == 1
    assert found["reltrace_redis_memory_bytes"] > 100_000
    assert found["reltrace_redis_memory_used_ratio"] == 0


async def test_jobs_that_end_from_outside_are_counted_with_what_they_were(
    exported: Exported,
) -> None:
    """
    Given a job that is leased and one that waits
    If both are cancelled, and another does not end within its timeout
    I expect each to be counted once, with its model and tenant.
    """
    await exported.worker.connect()
    answer = await exported.traces.SubmitJobs(submission(2))
    await exported.worker.lease(1)
    for _ in range(2):
        await exported.traces.CancelJobs(trace_pb2.CancelJobsRequest(job_ids=answer.job_ids))
    late = submission(1)
    late.jobs[0].timeout.FromMilliseconds(1)
    await exported.traces.SubmitJobs(late)
    where = {"model": "m", "tenant": "default"}
    await exported.wait("reltrace_jobs_ended_total", 1, state="failed", **where)
    assert await exported.value("reltrace_jobs_ended_total", state="cancelled", **where) == 2


async def test_a_submission_that_is_repeated_counts_once(exported: Exported) -> None:
    await exported.worker.connect()
    request = submission(3)
    request.idempotency_key = "once"
    for _ in range(2):
        await exported.traces.SubmitJobs(request)
    labels = {"tenant": "default", "priority": "interactive"}
    assert await exported.value("reltrace_jobs_submitted_total", **labels) == 3


async def test_lost_leases_and_failed_attempts(exported: Exported) -> None:
    await exported.worker.connect()
    await exported.traces.SubmitJobs(submission(2))
    first, _ = await exported.worker.lease(2)
    error = types_pb2.JobError(code=13, message="it broke")
    ref = worker_pb2.LeaseRef(job_id=first.job_id, attempt=first.attempt)
    await exported.worker.send(release=worker_pb2.Release(leases=[ref], error=error))
    await exported.wait("reltrace_attempts_failed_total", 1, model="m")
    # Nothing renews the other lease.
    await exported.wait("reltrace_leases_lost_total", 1, model="m")


async def test_calls_by_their_status(exported: Exported) -> None:
    await exported.worker.connect()
    await exported.traces.ListModels(trace_pb2.ListModelsRequest())
    with pytest.raises(grpc.aio.AioRpcError):
        await exported.traces.SubmitJobs(trace_pb2.SubmitJobsRequest())
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in exported.traces.StreamResults(trace_pb2.StreamResultsRequest()):
            pass
    for method, code in (("ListModels", "OK"), ("SubmitJobs", "INVALID_ARGUMENT")):
        assert await exported.value("reltrace_grpc_seconds_count", method=method, code=code) == 1
    stream = {"method": "StreamResults", "code": "NOT_FOUND"}
    await exported.wait("reltrace_grpc_streams_ended_total", 1, **stream)


async def test_redis_away(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    await exported.wait("reltrace_redis_up", 1)

    async def away(self: object) -> None:
        raise redis.exceptions.ConnectionError("gone")

    monkeypatch.setattr("reltrace_scheduler.observability.metrics.read_cluster", away)
    await exported.wait("reltrace_redis_up", 0)
    assert await exported.value("reltrace_redis_memory_bytes") is None


async def test_methods_that_do_not_exist_make_no_labels(
    redis_url: str, settings: Settings, tmp_path: Path
) -> None:
    """
    Given a scheduler that asks for a token
    If a caller without one names methods of its own
    I expect all of them under one label: label sets are kept for ever.
    """
    _, entry = make("alice", Role.CLIENT)
    append(tmp_path / "tokens.toml", entry)
    access = Access(Tokens(tmp_path / "tokens.toml"))
    client, counts = redis.asyncio.Redis.from_url(redis_url), Counts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reltrace_scheduler.api.server.Counts", lambda: counts)
        async with (
            serving(Connection(client, "test"), settings, access) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            for number in range(5):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(f"/reltrace.x/{number}")(b"", timeout=10)
    await client.aclose()
    (metric,) = counts.streams.collect()
    methods = {sample.labels["method"] for sample in metric.samples}
    assert methods == {"unknown"}


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:x", ":1"])
async def test_an_address_that_is_none(redis_url: str, settings: Settings, listen: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    with pytest.raises(SettingError, match=r"--metrics .*: must be HOST:PORT"):
        async with serving(Connection(client, "test"), replace(settings, metrics=listen)):
            pass
    await client.aclose()


async def test_an_address_that_is_taken(redis_url: str, settings: Settings) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingError, match=r"--metrics .*: Address already in use"):
            async with serving(Connection(client, "test"), replace(settings, metrics=listen)):
                pass
    await client.aclose()


async def test_every_metric_is_documented_and_the_other_way_round(exported: Exported) -> None:
    await exported.worker.connect()
    await exported.traces.SubmitJobs(submission(1))
    await exported.wait("reltrace_redis_up", 1)
    counted = {metric.name for metric in Counts().registry.collect()}
    text = await exported.text()
    exposed = set(re.findall(r"^# TYPE (reltrace_\w+?)(?:_total)? ", text, re.MULTILINE))
    exposed = {name for name in exposed if not name.endswith("_created")}
    documented = set(
        re.findall(r"^\| `(reltrace_\w+?)(?:_total)?` ", README.read_text(), re.MULTILINE)
    )
    assert counted <= documented
    assert exposed == documented
