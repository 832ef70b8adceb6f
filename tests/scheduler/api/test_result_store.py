"""Large results in a store: who may write where, and what is deleted."""

import os
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc, types_pb2, worker_pb2
from reltrace_scheduler.api.result_store import Sweeper, check_url, may_hold_results
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.auth.access import Access
from reltrace_scheduler.auth.identity import Role
from reltrace_scheduler.auth.tokens import Tokens, append, make
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.connection import Connection
from reltrace_scheduler.queue.store import Store
from reltrace_scheduler.records import NewJob
from scheduler.fake_worker import FakeWorker

PATTERNS = ("file:///srv/{tenant}/runs", "s3://bucket/of-{tenant}", "file:///srv/shared")


@pytest.mark.parametrize(
    ("url", "tenant", "allowed"),
    [
        ("file:///results/q/s-0.1.safetensors", "a", True),
        ("file:///results/q", "a", True),
        ("file:///results/other/s-0.1.safetensors", "a", False),
        ("file:///srv/a/runs/x", "a", True),
        ("file:///srv/b/runs/x", "a", False),
        ("file:///srv/a/../b/runs/x", "a", False),
        ("s3://bucket/of-a/x", "a", True),
        ("s3://bucket/of-ab/x", "a", False),
        ("file:///srv/shared/x", "a", True),
        ("file:///srv/b/runs/x", "", True),
        ("s3://bucket/of-b/x", "", True),
        ("s3://other/of-b/x", "", False),
        ("file:///etc/passwd", "", False),
        ("", "", False),
    ],
)
def test_where_workers_may_have_written(url: str, tenant: str, allowed: bool) -> None:
    assert may_hold_results(url, "file:///results/q", PATTERNS, tenant) is allowed


async def test_an_output_folder_is_its_tenants(
    store: Redis, redis_url: str, settings: Settings, tmp_path: Path
) -> None:
    """
    Given folders of tenants, and a client of team-a
    I expect its own folder to be taken, and neither that of team-b nor a URL that fsspec would
    read as two: team-b's file would be overwritten.
    """
    tokens, file = {}, tmp_path / "tokens.toml"
    for name, role, tenant in (
        ("a", Role.CLIENT, "team-a"),
        ("w", Role.WORKER, "default"),
    ):
        tokens[name], entry = make(name, role, tenant)
        append(file, entry)
    settings = replace(settings, output_uri=("file:///srv/{tenant}",))
    client = Redis.from_url(redis_url)
    async with (
        serving(Connection(client, "test"), settings, Access(Tokens(file))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        metadata = {name: (("authorization", f"Bearer {tokens[name]}"),) for name in tokens}
        await FakeWorker(channel, metadata=metadata["w"]).connect()
        stub = trace_pb2_grpc.TraceServiceStub(channel)

        async def submit(uri: str) -> None:
            job = types_pb2.JobSpec(prompt="a", output_uri=uri)
            request = trace_pb2.SubmitJobsRequest(jobs=[job])
            await stub.SubmitJobs(request, metadata=metadata["a"], timeout=10)

        await submit("file:///srv/team-a/run-1")
        for uri in (
            "file:///srv/team-b/run-1",
            "file:///srv/{tenant}/run-1",
            "file:///srv/team-a/../team-b/x",
            "file:///srv/team-a::file:///srv/team-b/shard-0.safetensors",
            "file:///srv/team-a/x::file:///srv/team-b",
            "file:///srv/team-a/%2e%2e/team-b",
        ):
            with pytest.raises(
                grpc.aio.AioRpcError,
                match=r'(here: file:///srv/team-a"|not below file:///srv/team-a by plain names)',
            ):
                await submit(uri)
    await client.aclose()


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/x", "file:///etc/passwd", "{ours}/x::file:///etc/passwd", ""]
)
async def test_a_worker_that_names_another_store(
    store: Redis, redis_url: str, settings: Settings, tmp_path: Path, url: str
) -> None:
    """
    Given a worker whose result says that its tensors are elsewhere than where it was told
    I expect the attempt to have failed, the reader to get no such URL as a manifest, and the result
    in our store of another attempt.
    """
    settings = replace(settings, results_url=tmp_path.as_uri(), lease=30.0)
    client = Redis.from_url(redis_url)
    async with (
        serving(Connection(client, "test"), settings) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        worker = FakeWorker(channel)
        ours = (await worker.connect()).results_url
        stub = trace_pb2_grpc.TraceServiceStub(channel)
        request = trace_pb2.SubmitJobsRequest(jobs=[types_pb2.JobSpec(prompt="a")])
        submission = await stub.SubmitJobs(request, timeout=10)
        assert submission.results_url == ours

        async def answer(named: str) -> None:
            (lease,) = await worker.lease(1)
            chunk = types_pb2.ResultChunk(
                job_id=lease.job_id, number=1, manifest=types_pb2.Manifest(url=named)
            )
            chunk.end.state = types_pb2.JOB_STATE_SUCCEEDED
            chunks = [worker_pb2.LeasedChunk(attempt=lease.attempt, chunk=chunk)]
            await worker.send(results=worker_pb2.Results(id=1, chunks=chunks))
            await worker.receive("committed")

        await answer(url.format(ours=ours))
        await answer(f"{ours}/{submission.job_ids[0]}.2.safetensors")
        stream = stub.StreamResults(
            trace_pb2.StreamResultsRequest(submission_id=submission.submission_id), timeout=10
        )
        (event,) = [event async for message in stream for event in message.events]
        assert event.chunk.manifest.url.startswith(f"{ours}/")
    await client.aclose()


@pytest.mark.parametrize(
    ("url", "said"), [("/srv/results", "must be a URL"), ("nothing://x", "nothing")]
)
def test_a_folder_that_can_not_be_one(url: str, said: str) -> None:
    with pytest.raises(StartError, match=f"--results-url {url}: .*{said}"):
        check_url("--results-url", url)


async def test_results_of_jobs_that_are_gone_are_deleted(
    store: Redis, tmp_path: Path, settings: Settings
) -> None:
    """
    Given files of a job that is queued, of one that is gone, of one that is being written, and a
    stranger's
    If the folder is swept
    I expect only that of the job that is gone to be deleted.
    """
    queue = Store(store, settings)
    submission = await queue.queue.submit([NewJob("m", b"spec")], tenant="t")
    (queued,) = submission.job_ids
    old = ["gone-0.1.safetensors", f"{queued}.2.safetensors", "notes.txt", "gone.safetensors"]
    for name in [*old, "gone-1.1.safetensors"]:
        (tmp_path / name).write_bytes(b"x")
    for name in old:
        os.utime(tmp_path / name, (1_700_000_000, 1_700_000_000))
    assert await Sweeper(tmp_path.as_uri(), queue).sweep() == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*old[1:], "gone-1.1.safetensors"}


async def test_a_folder_that_is_not_there_yet(
    store: Redis, tmp_path: Path, settings: Settings
) -> None:
    assert await Sweeper((tmp_path / "later").as_uri(), Store(store, settings)).sweep() == 0
