"""Whether a Redis can keep what is promised: its settings at start, and whether it takes writes."""

from typing import Any

import structlog
from redis.asyncio import Redis

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.queue.connection import info_of_nodes
from reltrace_scheduler.queue.trouble import REDIS_ERRORS, reason_of

log = structlog.get_logger()


async def check_fitness(client: Redis, shown: str, *, allow_volatile: bool) -> None:
    """Check every server that keeps jobs, by INFO alone: managed services refuse CONFIG.

    Parameters
    ----------
    shown : str
        The address, for messages.
    allow_volatile : bool
        Accept servers that may forget accepted jobs, with a warning in the log.

    Raises
    ------
    StartError
        A server is a read-only replica, writes no append-only file, or may evict keys.
    """
    try:
        servers = await info_of_nodes(client)
    except REDIS_ERRORS as error:
        raise StartError(f"Redis at {shown} does not tell its state: {reason_of(error)}") from error
    for node, info in servers.items():
        where = f"Redis at {shown}" + (f", node {node}" if node else "")
        if info.get("role") != "master":
            primary = f"{info.get('master_host')}:{info.get('master_port')}"
            raise StartError(f"{where} is a read-only replica of {primary}: name the primary")
        faults = _faults(info)
        if not faults:
            continue
        if not allow_volatile:
            raise StartError(
                f"{where} may lose accepted jobs: {'; '.join(faults)} "
                "(--allow-volatile-redis accepts this)"
            )
        log.warning("redis.volatile", redis=where, faults=faults)


def _faults(info: dict[str, Any]) -> list[str]:
    """Return why a server may forget what it has accepted, and what to set."""
    faults: list[str] = []
    if info.get("aof_enabled") != 1:
        faults.append("it writes no append-only file, set `appendonly yes`")
    policy = info.get("maxmemory_policy")
    # Also without a bound on its memory: the bound may be set while it runs.
    if policy != "noeviction":
        faults.append(
            f"it evicts keys when it is full (maxmemory-policy {policy}), "
            "set `maxmemory-policy noeviction`"
        )
    return faults
