"""A Redis that can not keep what is promised is refused at start, in one line."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from redis.asyncio import Redis
from redis_cluster import ClusterNode, redis_cluster
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local.redis import EmbeddedRedis
from reltrace_scheduler.queue.connection import connect
from reltrace_scheduler.queue.fitness import check_fitness


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    """A fit Redis of the test's own."""
    server = EmbeddedRedis(tmp_path)
    yield await server.start()
    await server.stop()


@pytest.fixture
async def client(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url) as client:
        yield client


VOLATILE = {
    "it writes no append-only file, set `appendonly yes`": ("appendonly", "no"),
    "(maxmemory-policy allkeys-lru), set `maxmemory-policy noeviction`": (
        "maxmemory-policy", "allkeys-lru",
    ),
    "(maxmemory-policy volatile-ttl), set": ("maxmemory-policy", "volatile-ttl"),
}  # fmt: skip


@pytest.mark.parametrize("fault", VOLATILE)
async def test_a_redis_that_forgets(client: Redis, fault: str) -> None:
    await check_fitness(client, "r", allow_volatile=False)
    await client.config_set(*VOLATILE[fault])

    with pytest.raises(StartError) as refused:
        await check_fitness(client, "r", allow_volatile=False)
    assert fault in str(refused.value)
    assert "--allow-volatile-redis" in str(refused.value)

    with structlog.testing.capture_logs() as lines:
        await check_fitness(client, "r", allow_volatile=True)
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("redis.volatile", "warning")
    assert fault in line["faults"][0]


@pytest.mark.parametrize("allow", [False, True])
async def test_a_replica_is_refused_in_any_case(client: Redis, allow: bool) -> None:
    await client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StartError, match=r"is a read-only replica of 127\.0\.0\.1:1: name the pri"):
        await check_fitness(client, "r", allow_volatile=allow)


async def test_the_command_says_it_in_one_line(client: Redis, url: str) -> None:
    """Given a replica as --redis, I expect one line and code 1 (there was a traceback)."""
    for primary in (("127.0.0.1", "1"), ("NO", "ONE")):
        await client.execute_command("REPLICAOF", *primary)
        await client.config_set("appendonly", "no")
        options = ("-m", "reltrace_scheduler", "--redis", url, "--listen", "127.0.0.1:0")
        done = subprocess.run(
            [sys.executable, *options], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert done.stderr.startswith("reltrace-scheduler: Redis at unix://")
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[ClusterNode]]:
    with redis_cluster(3) as nodes:
        yield nodes


async def test_every_primary_of_a_cluster_is_looked_at(cluster: list[ClusterNode]) -> None:
    connection = await connect(cluster[0].url)
    await check_fitness(connection.redis, "c", allow_volatile=False)
    async with Redis(port=cluster[2].port) as last:
        await last.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(StartError, match=f"Redis at c, node 127.0.0.1:{cluster[2].port} may lose"):
        await check_fitness(connection.redis, "c", allow_volatile=False)
    await connection.redis.aclose()
