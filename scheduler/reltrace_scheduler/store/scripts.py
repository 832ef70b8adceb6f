"""The Lua scripts, loaded from their files."""

from importlib.resources import files
from typing import Any

from redis.asyncio import Redis


class Scripts:
    """Calls of the `.lua` files in this package; each documents its keys at its head."""

    def __init__(self, redis: Redis) -> None:
        folder = files(__package__) / "lua"
        self._redis = redis
        self._scripts = {
            name: redis.register_script((folder / f"{name}.lua").read_text())
            for name in (
                "submit",
                "lease",
                "renew",
                "commit",
                "requeue",
                "reap",
                "acknowledge",
                "forget",
            )
        }

    async def __call__(self, name: str, keys: list[str], *args: str | bytes | int) -> Any:
        """Run a script; it is loaded again when Redis has lost it."""
        return await self._scripts[name](keys=keys, args=args)
