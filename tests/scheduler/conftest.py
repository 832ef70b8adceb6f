import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import redis.asyncio
from reltrace_proto.v1 import trace_pb2_grpc
from reltrace_scheduler.api.server import serving
from reltrace_scheduler.config import Settings
from reltrace_scheduler.keys import Keys
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue.connection import Connection
from reltrace_scheduler.queue.registry import Registry
from reltrace_scheduler.queue.results import Results
from scheduler.driver import Driver
from scheduler.fake_worker import FakeWorker


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis for the whole test run."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield asyncio.run(server.start())
    asyncio.run(server.stop())


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """An empty Redis without a bound on its memory, whatever the test before has set."""
    client = redis.asyncio.Redis.from_url(redis_url)
    await client.config_set("maxmemory", 0)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def settings() -> Settings:
    return Settings(
        listen="127.0.0.1:0",
        lease=0.5,
        result_ttl=60,
        max_jobs=50,
        max_bytes=1 << 20,
        retry_delay=0.01,
        max_failures=2,
    )


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
def driver(store: redis.asyncio.Redis, settings: Settings) -> Driver:
    return Driver.over(store, settings)


@pytest.fixture
def results(driver: Driver) -> Results:
    return driver.results


@pytest.fixture
def registry(driver: Driver) -> Registry:
    return driver.store.registry


@pytest.fixture
async def server(
    store: redis.asyncio.Redis, redis_url: str, settings: Settings
) -> AsyncIterator[str]:
    """A scheduler in this process, on a port of its own; gives its address."""
    client = redis.asyncio.Redis.from_url(redis_url)
    async with serving(Connection(client, "test"), settings) as address:
        yield address
    await client.aclose()


@pytest.fixture
async def channel(server: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server) as channel:
        yield channel


@pytest.fixture
def client(channel: grpc.aio.Channel) -> "trace_pb2_grpc.TraceServiceAsyncStub":
    return trace_pb2_grpc.TraceServiceStub(channel)


@pytest.fixture
async def worker(channel: grpc.aio.Channel) -> FakeWorker:
    worker = FakeWorker(channel)
    await worker.connect()
    return worker
