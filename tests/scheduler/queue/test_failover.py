"""The scheduler's Redis fails over to a replica: real servers, and real Sentinels."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis_cluster import free_ports, redis_cluster
from redis_failover import SERVICE, RedisNode, Service, redis_nodes, sentinels
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.address import RedisAddress
from reltrace_scheduler.queue.connection import Connection, connect
from scheduler.driver import Driver, jobs


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[RedisNode]]:
    """A primary and its replica."""
    with redis_nodes(tmp_path, 2) as nodes:
        nodes[1].follow(nodes[0])
        yield nodes


@asynccontextmanager
async def connected(address: str | RedisAddress) -> AsyncIterator[Connection]:
    connection = await connect(address)
    try:
        yield connection
    finally:
        await connection.redis.aclose()


async def until_it_works(call: Callable[[], Awaitable[object]], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while True:
            try:
                await call()
            except RedisError:
                await asyncio.sleep(0.05)
            else:
                return


def clients_of(node: RedisNode) -> int:
    """Count the connections to a server beside the test's own and its replicas'."""
    return len(node.admin.client_list(_type="normal")) - 1


async def test_a_demoted_primary_is_left(pair: list[RedisNode], settings: Settings) -> None:
    """
    Given a scheduler with several connections to a primary, by a name that leads to it
    If the primary becomes the replica of another, to which the name leads from now on
    I expect the next script to run there, and no connection to the old one to be used again.
    """
    old, new = pair
    with Service(old.port).serving() as service:
        async with connected(service.url) as connection:
            driver = Driver.over(connection.redis, settings)
            await asyncio.gather(*(connection.redis.client_id() for _ in range(5)))
            assert clients_of(old) >= 5
            new.follow(None)
            service.target = new.port
            old.follow(new)
            submitted = await driver.submit(jobs(3))
            assert new.admin.exists(f"reltrace:{{0}}:submission:{submitted.id}")
            assert await connection.redis.config_get("port") == {"port": str(new.port)}
            assert clients_of(old) == 0


async def test_a_replica_with_nothing_behind_its_address(
    pair: list[RedisNode], settings: Settings
) -> None:
    """
    Given a scheduler whose Redis becomes a replica, and an address that still leads to it
    If it calls, I expect a failure as of a Redis that is away, and success once it is primary.
    """
    only, other = pair
    async with connected(only.url) as connection:
        driver = Driver.over(connection.redis, settings)
        other.follow(None)
        only.follow(other)
        with pytest.raises(RedisConnectionError, match="is a replica"):
            await driver.submit(jobs(1))
        only.follow(None)
        await driver.submit(jobs(1))


@pytest.mark.slow
@pytest.mark.parametrize("planned", [False, True])
async def test_sentinels_name_the_primary(
    pair: list[RedisNode], settings: Settings, tmp_path: Path, planned: bool
) -> None:
    """
    Given a scheduler that knows three Sentinels, the first of which is down
    If its primary is killed, or they are asked for a failover, I expect it to go on with the
    replica that they promote.
    """
    primary, replica = pair
    with sentinels(tmp_path, primary, 3, quorum=2) as ports:
        (dead,) = free_ports(1)
        hosts = ",".join(f"127.0.0.1:{port}" for port in (dead, *ports))
        url = f"redis+sentinel://{hosts}/{SERVICE}"
        async with connected(url) as connection:
            driver = Driver.over(connection.redis, replace(settings, max_jobs=10_000))
            before = await driver.submit(jobs(1))
            replica.follow(primary)
            if planned:
                with redis.Redis(port=ports[0]) as sentinel:
                    sentinel.execute_command("SENTINEL", "FAILOVER", SERVICE)
            else:
                primary.kill()

            async def submit_there() -> None:
                await driver.submit(jobs(1))
                found = await connection.redis.config_get("port")
                if found != {"port": str(replica.port)}:
                    raise RedisError(f"at {found}")

            await until_it_works(submit_there)
            assert await driver.results.progress(before.id)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://127.0.0.1:{0},127.0.0.1:{0}", "several hosts, but is no Redis Cluster"),
        ("redis+sentinel://127.0.0.1:{0}/mymaster", "unknown command .SENTINEL"),
        ("redis+sentinel://127.0.0.1:{0}", r"must be .*redis\+sentinel://HOST:PORT,HOST:PORT/NAME"),
        ("redis+sentinel://:secret@127.0.0.1:x/mymaster", "must be redis://HOST:PORT"),
    ],
)
async def test_addresses_that_lead_to_something_else(
    url: str, message: str, tmp_path: Path
) -> None:
    with redis_nodes(tmp_path, 1) as (node,):
        with pytest.raises(StartError, match=message) as caught:
            await connect(url.format(node.port))
        assert "secret" not in str(caught.value)


async def test_the_address_of_a_sentinel(pair: list[RedisNode], tmp_path: Path) -> None:
    with (
        sentinels(tmp_path, pair[0], 1, quorum=1) as (port,),
        pytest.raises(StartError, match=r"is a Sentinel; write redis\+sentinel://"),
    ):
        await connect(f"redis://127.0.0.1:{port}")


async def test_one_seed_of_a_cluster_is_down() -> None:
    (dead,) = free_ports(1)
    with redis_cluster(2) as nodes:
        hosts = ",".join(f"127.0.0.1:{port}" for port in (dead, *(n.port for n in nodes)))
        async with connected(f"redis://{hosts}") as connection:
            assert await connection.redis.set("{a}", 1)
            nodes_known: object = connection.redis.get_primaries()  # type: ignore[attr-defined]
            assert len(nodes_known) == 2  # type: ignore[arg-type]


async def test_passwords_of_sentinels_and_primary(pair: list[RedisNode], tmp_path: Path) -> None:
    """
    Given a Sentinel and a primary with a user and a password each
    If the URL names them, or an option the primary's password, I expect a connection as that user.
    """
    primary = pair[0]
    primary.admin.execute_command("ACL", "SETUSER", "app", "on", ">p/1", "+@all", "~*", "&*")
    with (
        sentinels(tmp_path, primary, 1, quorum=1) as (port,),
        redis.Redis(port=port) as sentinel,
    ):
        sentinel.execute_command("ACL", "SETUSER", "watch", "on", ">s/1", "+@all")
        place = f"127.0.0.1:{port}/{SERVICE}?sentinel_username=watch&sentinel_password="
        for address in (
            RedisAddress(f"redis+sentinel://app:p%2F1@{place}s%2F1"),
            RedisAddress(f"redis+sentinel://app@{place}s%2F1", password="p/1"),
        ):
            async with connected(address) as connection:
                assert await connection.redis.acl_whoami() == "app"
        for url in (
            f"redis+sentinel://app:other@{place}s%2F1",
            f"redis+sentinel://app:p%2F1@{place}other",
        ):
            with pytest.raises(StartError, match=r"invalid user|auth:Auth\w+$") as caught:
                await connect(url)
            assert "other" not in str(caught.value)
