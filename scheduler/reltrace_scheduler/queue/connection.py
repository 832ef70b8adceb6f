"""Connecting to Redis, and refusing one that can not do the work."""

import re
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, RedisError

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.address import PASSWORD_VARIABLE, RedisAddress

OLDEST = (6, 2)
"""XAUTOCLAIM and XTRIM MINID came with Redis 6.2."""

_TIMEOUT = 5.0
_OPTIONS: dict[str, Any] = {
    "decode_responses": False,
    # RESP3 begins with a command that a Redis too old for us does not know: it would fail before
    # its version could be read.
    "protocol": 2,
    "socket_timeout": _TIMEOUT,
    "socket_connect_timeout": _TIMEOUT,
    "health_check_interval": 15,
    # A pool that is exhausted raises, and hundreds of workers may connect again at one moment.
    "max_connections": 4096,
}


@dataclass(frozen=True, slots=True)
class Connection:
    redis: Redis
    version: str


async def connect(address: str | RedisAddress) -> Connection:
    """Connect and check the version.

    Raises
    ------
    StartError
        The URL is malformed, nothing answers, the password is wrong, or the server is
        older than 6.2. The message shows the URL without its password.
    """
    if isinstance(address, str):
        address = RedisAddress(address)
    shown = address.shown
    # One quick retry; how long to wait beyond that is the caller's decision.
    client = _client(Redis, address, Retry(ExponentialBackoff(cap=0.2, base=0.05), 1))
    try:
        info = await client.info("server")
        if info.get("redis_mode") == "cluster":
            await client.aclose()
            # While a replica takes over, no node serves its slots for some seconds.
            retry = Retry(ExponentialBackoff(cap=1.0, base=0.1), 5)
            client = _client(RedisCluster, address, retry)
            await client.initialize()
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
    if parse_version(version) < OLDEST:
        await client.aclose()
        raise StartError(f"Redis at {shown} is {version}; reltrace needs 6.2 or newer")
    return Connection(client, version)


def _client(kind: type[Redis] | type[RedisCluster], address: RedisAddress, retry: Retry) -> Redis:
    options = dict(_OPTIONS)
    if address.ca is not None:
        options["ssl_ca_certs"] = str(address.ca)
    if address.password is not None:
        options["password"] = address.password
    try:
        client: Any = kind.from_url(address.url, retry=retry, **options)
    except ValueError:
        # Its text may quote a part of the password.
        raise StartError(
            f"--redis {address.shown}: must be redis://HOST:PORT, rediss://HOST:PORT or "
            "unix:///PATH; in a password, write / as %2F, ? as %3F, # as %23, % as %25 and @ as %40"
        ) from None
    if address.password is not None and isinstance(client, Redis):
        # The argument gives way to a password in the URL.
        client.connection_pool.connection_kwargs["password"] = address.password
    # Both kinds have the commands that the queue uses, and no common base that says so.
    return cast("Redis", client)


async def memory_used(client: Redis) -> int:
    """Return the bytes that Redis uses, or all primaries of a cluster together."""
    if isinstance(client, RedisCluster):
        nodes: Any = await client.info("memory", target_nodes=RedisCluster.PRIMARIES)
        return sum(int(node["used_memory"]) for node in nodes.values())
    info: Any = await client.info("memory")
    return int(info["used_memory"])


def reason_of(error: Exception) -> str:
    """Return what Redis said, without the command, which redis-py quotes and which may hold texts
    of jobs.
    """
    return str(error).rpartition(" of pipeline caused error: ")[2]


def parse_version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as ``7.0.15``."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
