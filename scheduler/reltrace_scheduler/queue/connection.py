"""Connecting to Redis, and refusing one that can not do the work."""

import re
from dataclasses import dataclass
from typing import Any, cast

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, RedisError

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.address import PASSWORD_VARIABLE, RedisAddress

OLDEST = (6, 2)
"""XAUTOCLAIM and XTRIM MINID came with Redis 6.2."""

_TIMEOUT = 5.0
_MOST_CONNECTIONS = 4096
"""A pool that is exhausted raises. Hundreds of workers may want something at one moment, such as
when they are cut off and come again together."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A Redis that answers and is new enough."""

    redis: "redis.asyncio.Redis"
    version: str


async def connect(address: str | RedisAddress) -> Connection:
    """Connect and check the version.

    Parameters
    ----------
    address : str or RedisAddress
        A URL, or one with what else it takes.

    Raises
    ------
    StartError
        The URL is malformed, nothing answers, the password is wrong, or the server is
        older than 6.2. The message shows the URL without its password.
    """
    if isinstance(address, str):
        address = RedisAddress(address)
    shown = address.shown
    extra: dict[str, Any] = {}
    if address.ca is not None:
        extra["ssl_ca_certs"] = str(address.ca)
    try:
        client = redis.asyncio.Redis.from_url(
            address.url,
            decode_responses=False,
            # RESP3 begins with a command that a Redis too old for us does not know: it would
            # fail before its version could be read.
            protocol=2,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            health_check_interval=15,
            max_connections=_MOST_CONNECTIONS,
            # One quick try again: a longer wait belongs to the caller, who is told.
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 1),
            **extra,
        )
    except ValueError:
        # Its text may quote a part of the password.
        raise StartError(
            f"--redis {shown}: must be redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH; "
            "in a password, write / as %2F, ? as %3F, # as %23, % as %25 and @ as %40"
        ) from None
    if address.password is not None:
        # What the URL says would win over an argument.
        client.connection_pool.connection_kwargs["password"] = address.password
    try:
        info = await client.info("server")
    except AuthenticationError as error:
        await client.aclose()
        raise StartError(
            f"--redis {shown}: {error} (a password goes into {PASSWORD_VARIABLE} "
            "or a file named by --redis-password-file)"
        ) from error
    except (RedisError, OSError) as error:
        await client.aclose()
        raise StartError(f"Redis at {shown} can not be reached: {error}") from error
    version = str(info["redis_version"])
    if info.get("redis_mode") == "cluster":
        client = await _as_cluster(client, address, extra)
    if parse_version(version) < OLDEST:
        await client.aclose()
        raise StartError(f"Redis at {shown} is {version}; reltrace needs 6.2 or newer")
    return Connection(client, version)


async def _as_cluster(
    node: "redis.asyncio.Redis", address: RedisAddress, extra: dict[str, Any]
) -> "redis.asyncio.Redis":
    """Exchange the connection to one node of a Redis Cluster for one that knows them all."""
    password = node.connection_pool.connection_kwargs.get("password")
    await node.aclose()
    cluster = redis.asyncio.RedisCluster.from_url(
        address.url,
        decode_responses=False,
        protocol=2,
        socket_timeout=_TIMEOUT,
        socket_connect_timeout=_TIMEOUT,
        health_check_interval=15,
        max_connections=_MOST_CONNECTIONS,
        # While a replica takes over, its slots are nobody's for some seconds.
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), 5),
        **({"password": password} if password else {}),
        **extra,
    )
    try:
        await cluster.initialize()
    except (RedisError, OSError) as error:
        await cluster.aclose()
        raise StartError(f"Redis Cluster at {address.shown}: {error}") from error
    # Both have the commands that the store uses, and no common base that says so.
    return cast("redis.asyncio.Redis", cluster)


async def memory_used(client: "redis.asyncio.Redis") -> int:
    """Return the bytes that Redis uses, or all primaries of a cluster together."""
    if isinstance(client, redis.asyncio.RedisCluster):
        nodes: dict[str, Any] = await client.info(
            "memory", target_nodes=redis.asyncio.RedisCluster.PRIMARIES
        )
        return sum(int(node["used_memory"]) for node in nodes.values())
    info: Any = await client.info("memory")
    return int(info["used_memory"])


def parse_version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as ``7.0.15``."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
