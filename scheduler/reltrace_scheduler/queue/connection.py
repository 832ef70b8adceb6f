"""Connecting to Redis, and refusing one that can not do the work."""

import re
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import AuthenticationError

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.address import PASSWORD_VARIABLE, RedisAddress
from reltrace_scheduler.queue.client import clients, cluster
from reltrace_scheduler.queue.trouble import REDIS_ERRORS

OLDEST = (6, 2)
"""XAUTOCLAIM and XTRIM MINID came with Redis 6.2."""

_BUFFERS = ("mem_clients_normal", "mem_clients_slaves", "mem_aof_buffer")


@dataclass(frozen=True, slots=True)
class Connection:
    redis: Redis
    version: str


async def connect(address: str | RedisAddress) -> Connection:
    """Connect, and check that it is what the address says and new enough.

    Raises
    ------
    StartError
        The URL is malformed, nothing answers, the password is wrong, or the server is
        older than 6.2. The message shows the URL without its password.
    """
    if isinstance(address, str):
        address = RedisAddress(address)
    shown = address.shown
    try:
        client, info = await _open(address)
    except AuthenticationError as error:
        raise StartError(
            f"--redis {shown}: {error} (a password goes into {PASSWORD_VARIABLE} "
            "or a file named by --redis-password-file)"
        ) from error
    except REDIS_ERRORS as error:
        raise StartError(f"Redis at {shown} can not be reached: {error}") from error
    if fault := _unfit(address, info.get("redis_mode", "")):
        await client.aclose()
        raise StartError(f"--redis {shown}: {fault}")
    version = str(info["redis_version"])
    if parse_version(version) < OLDEST:
        await client.aclose()
        raise StartError(f"Redis at {shown} is {version}; reltrace needs 6.2 or newer")
    return Connection(client, version)


async def _open(address: RedisAddress) -> tuple[Redis, Any]:
    """Connect to the first host that answers, or to its cluster; also return what it says."""
    failure: Exception | None = None
    for client in clients(address):
        try:
            info: Any = await client.info("server")
            if info.get("redis_mode") != "cluster":
                return client, info
            await client.aclose()
            client = cluster(address)
            await client.initialize()
            return client, info
        except REDIS_ERRORS as error:
            await client.aclose()
            if isinstance(error, AuthenticationError):
                raise
            failure = error
    assert failure is not None
    raise failure


def _unfit(address: RedisAddress, mode: str) -> str | None:
    """Return why a server of this `redis_mode` is not what the address says."""
    if mode == "sentinel":
        return "is a Sentinel; write redis+sentinel://HOST:PORT/NAME"
    if mode != "cluster" and len(address.single) > 1 and not address.is_sentinel:
        return (
            "names several hosts, but is no Redis Cluster; name one host, or Sentinels by "
            "redis+sentinel://HOST:PORT,HOST:PORT/NAME"
        )
    return None


@dataclass(frozen=True, slots=True)
class NodeMemory:
    used: int
    buffers: int
    """Of it, what messages and replies take for a moment."""
    limit: int
    """Redis' `maxmemory`; 0: none."""

    @property
    def used_part(self) -> float:
        """Part of `limit` that lasting things take; 0: there is none."""
        return (self.used - self.buffers) / self.limit if self.limit else 0.0


async def info_of_nodes(client: Redis, *sections: str) -> dict[str, Any]:
    """Return what each primary of a cluster says, by its name; of another server, under ""."""
    if isinstance(client, RedisCluster):
        by_node: Any = await client.info(*sections, target_nodes=RedisCluster.PRIMARIES)
        return dict(by_node)
    return {"": await client.info(*sections)}


async def memory_of_nodes(client: Redis) -> list[NodeMemory]:
    """Return the bytes that Redis uses and may use; of a cluster, those of each primary."""
    nodes = (await info_of_nodes(client, "memory")).values()
    return [
        NodeMemory(
            used=int(node["used_memory"]),
            buffers=sum(int(node.get(name, 0)) for name in _BUFFERS),
            limit=int(node["maxmemory"]),
        )
        for node in nodes
    ]


def parse_version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as ``7.0.15``."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
