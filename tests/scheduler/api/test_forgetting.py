"""What nobody uses any more is forgotten: models, the jobs that wait for them, idle tenants."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import grpc
import pytest
import redis.asyncio
from google.rpc import code_pb2
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc, trace_pb2, trace_pb2_grpc, types_pb2
from reltrace_scheduler.api import forgetting
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.observability.metrics import Counts
from reltrace_scheduler.queue.connection import Connection
from reltrace_scheduler.records import Limits
from scheduler.driver import Driver, end, jobs
from scheduler.fake_worker import MODEL, FakeWorker
from scheduler.trace_calls import JobSpec, collect, submission

TTL = 1.0


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "_PERIOD", 0.05)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, model_ttl=TTL)


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> "admin_pb2_grpc.AdminServiceAsyncStub":
    return admin_pb2_grpc.AdminServiceStub(channel)


def model(name: str, revision: str = "") -> types_pb2.ModelInfo:
    info = types_pb2.ModelInfo()
    info.CopyFrom(MODEL)
    info.name, info.revision = name, revision
    return info


async def come_and_go(channel: grpc.aio.Channel, name: str, revision: str = "") -> None:
    worker = FakeWorker(channel, f"worker-of-{name}", model(name, revision))
    await worker.connect()
    await worker.send(leave={})
    await worker.call.done_writing()
    async with asyncio.timeout(10):
        assert await worker.call.read() is grpc.aio.EOF


async def models(client) -> dict[str, int]:
    answer = await client.ListModels(trace_pb2.ListModelsRequest())
    return {found.model.name: found.workers for found in answer.models}


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.05)


async def heartbeats(worker: FakeWorker) -> None:
    while True:
        await worker.send(heartbeat={})
        await asyncio.sleep(0.1)


@pytest.fixture
async def served(worker: FakeWorker) -> AsyncIterator[None]:
    """The model m has a worker all the time."""
    beating = asyncio.create_task(heartbeats(worker))
    yield
    beating.cancel()


async def test_models_that_nobody_serves_are_forgotten(
    client, channel: grpc.aio.Channel, served: None
) -> None:
    """
    Given workers with typos for names that came and went, and one that stays
    I expect the list of models to shrink to that of the one that stays.
    """
    for number in range(20):
        await come_and_go(channel, f"typo-{number}", "r1")
    assert len(await models(client)) == 21

    async def shrunk() -> bool:
        return await models(client) == {"m": 1}

    await eventually(shrunk)
    # And it stays.
    await asyncio.sleep(1.5 * TTL)
    assert await models(client) == {"m": 1}


async def test_jobs_for_a_model_that_is_forgotten_are_told(
    client, channel: grpc.aio.Channel, served: None
) -> None:
    await come_and_go(channel, "typo", "r1")
    specs = [JobSpec(prompt="a", model="typo"), JobSpec(prompt="a", model="typo@r1")]
    answer = await client.SubmitJobs(submission(*specs))
    assert list(answer.unserved) == ["typo", "typo@r1"]
    events = await collect(client, answer.submission_id)
    for event, spec in zip(sorted(events, key=lambda e: e.chunk.job_id), specs, strict=True):
        (violation,) = event.chunk.end.error.violations
        assert event.chunk.end.state == types_pb2.JOB_STATE_FAILED
        assert event.chunk.end.error.code == code_pb2.NOT_FOUND
        assert violation.field == "model"
        assert violation.description.startswith(f"'{spec.model}' has been without a worker")
    with pytest.raises(grpc.aio.AioRpcError, match="'typo' is not served; served: m") as refused:
        await client.SubmitJobs(submission(specs[0]))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_served_model_is_not_told_of(client, served: None) -> None:
    assert not (await client.SubmitJobs(submission(JobSpec(prompt="a")))).unserved


async def test_an_operator_forgets_a_model_at_once(
    store: redis.asyncio.Redis, redis_url: str, settings: Settings
) -> None:
    redis_client = redis.asyncio.Redis.from_url(redis_url)
    async with (
        serving(Connection(redis_client, "test"), replace(settings, model_ttl=3600)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        client = trace_pb2_grpc.TraceServiceStub(channel)
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        worker = FakeWorker(channel)
        await worker.connect()
        beating = asyncio.create_task(heartbeats(worker))
        await come_and_go(channel, "typo", "r1")
        await come_and_go(channel, "typo-2", "r1")
        answer = await client.SubmitJobs(submission(JobSpec(prompt="a", model="typo@r1")))

        for names, code, said in (
            (["m"], grpc.StatusCode.INVALID_ARGUMENT, "'m' \\(1 workers\\); drain"),
            (["typo", "x"], grpc.StatusCode.NOT_FOUND, "models\\[1\\]: no model 'x' is known"),
            ([], grpc.StatusCode.INVALID_ARGUMENT, "must name 1 to 1000 models"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=said) as refused:
                await admin.ForgetModels(admin_pb2.ForgetModelsRequest(models=names))
            assert refused.value.code() is code
        assert set(await models(client)) == {"m", "typo", "typo-2"}

        done = await admin.ForgetModels(admin_pb2.ForgetModelsRequest(models=["typo"]))
        assert list(done.routes) == ["typo", "typo@r1"]
        (event,) = await collect(client, answer.submission_id)
        assert event.chunk.end.error.code == code_pb2.NOT_FOUND

        async def shrunk() -> bool:
            return set(await models(client)) == {"m", "typo-2"}

        await eventually(shrunk)
        beating.cancel()
    await redis_client.aclose()


async def test_a_tenant_is_forgotten_when_it_holds_nothing(
    driver: Driver, store: redis.asyncio.Redis, keys: Keys
) -> None:
    """
    Given a tenant with a queued job, one with an unread result, one with a limit, and 1,200 whose
    jobs have ended and been read
    I expect the first three to be kept, and nothing of the others.
    """
    tenants = driver.store.tenants
    await driver.submit(jobs(1), tenant="queued")
    await tenants.set("limited", Limits(max_jobs=7))
    await tenants.set("named", Limits())
    for number in range(1200):
        await store.sadd(keys("tenants"), f"gone-{number}")
        await store.hset(keys("tenant", f"gone-{number}"), mapping={"jobs": 0, "bytes": 0})
    await tenants.forget_idle()
    assert await tenants.names() == {"queued", "limited"}
    assert not await store.exists(keys("tenant", "gone-7"))

    (job,) = await driver.lease("w", 1)
    await driver.commit("w", [end(job)])
    await tenants.forget_idle()
    assert await tenants.names() == {"queued", "limited"}
    await driver.results.acknowledge(job.job_id.rpartition("-")[0], 1)
    await tenants.forget_idle()
    assert await tenants.names() == {"limited"}
    assert (await tenants.get("limited")).limits.max_jobs == 7


async def test_metrics_of_a_tenant_and_a_model_that_are_gone_end_after_a_day(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(forgetting, "monotonic", lambda: now)
    counts, store = Counts(), driver.store
    await driver.submit(jobs(1), tenant="here")
    await store.redis.hset(driver.shard.key("models"), "m", b"")
    for tenant in ("here", "gone"):
        counts.submitted.labels(tenant, "batch").inc()
        counts.ended.labels("m", tenant, "failed").inc()
    counts.leased.labels("typo").inc()
    found = forgetting.Forgetting(store, counts)

    async def look() -> set[tuple[str, str]]:
        await found._forget_metrics()
        return counts.labels("tenant", "model")

    everything = {("tenant", "here"), ("tenant", "gone"), ("model", "m"), ("model", "typo")}
    assert await look() == everything
    now = 23 * 3600.0
    assert await look() == everything
    now = 24 * 3600.0
    assert await look() == {("tenant", "here"), ("model", "m")}
