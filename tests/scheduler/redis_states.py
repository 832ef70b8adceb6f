"""A real Redis, brought into the states in which one takes no writes, and out of them again."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from waiting import wait_until_async

STATES = ("OOM", "READONLY", "MASTERDOWN", "MISCONF", "NOREPLICAS")


@dataclass
class RedisStates:
    """Brings a Redis of the test's own into a state, named by the code of its errors."""

    client: Redis
    folder: Path

    async def enter(self, state: str) -> None:
        match state:
            case "OOM":
                await fill(self.client)
            case "READONLY":
                await self.client.execute_command("REPLICAOF", "127.0.0.1", "1")
            case "MASTERDOWN":
                await self.client.config_set("replica-serve-stale-data", "no")
                await self.client.execute_command("REPLICAOF", "127.0.0.1", "1")
            case "NOREPLICAS":
                await self.client.config_set("min-replicas-to-write", 1)
            case "MISCONF":
                # A file can not take the place of a folder.
                (self.folder / "dump.rdb").mkdir()
                await self.client.config_set("save", "3600 1000000")
                await self._save("err")

    async def leave(self, state: str) -> None:
        match state:
            case "OOM":
                await make_room(self.client)
            case "READONLY" | "MASTERDOWN":
                await self.client.execute_command("REPLICAOF", "NO", "ONE")
            case "NOREPLICAS":
                await self.client.config_set("min-replicas-to-write", 0)
            case "MISCONF":
                (self.folder / "dump.rdb").rmdir()
                await self._save("ok")

    async def _save(self, status: str) -> None:
        await self.client.bgsave()

        async def is_over() -> bool:
            state = await self.client.info("persistence")
            return bool(
                not state["rdb_bgsave_in_progress"] and state["rdb_last_bgsave_status"] == status
            )

        await wait_until_async(is_over, f"a save that ends with {status!r}", 20)


async def fill(client: Redis) -> None:
    """Let a Redis be full of what is not ours."""
    await client.config_set("maxmemory", 64 << 20)
    await client.setrange("filler", 80 << 20, "end")


async def make_room(client: Redis) -> None:
    await client.delete("filler")
    await client.config_set("maxmemory", 0)


async def failure(call: Callable[[], Awaitable[object]]) -> Exception | None:
    try:
        await call()
    except Exception as error:
        return error
    return None
