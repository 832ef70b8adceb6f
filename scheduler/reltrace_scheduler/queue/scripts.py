"""The Lua scripts, loaded from their files."""

from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from reltrace_scheduler.keys import GROUP, Keys


class Scripts:
    """Calls of the `.lua` files in this package; each documents its keys at its head."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._prefix = keys.prefix
        # A Redis Cluster finds the node of a script by one of its keys.
        self._anchor = [keys.clock]
        self._loaded: dict[str, AsyncScript] = {}

    async def __call__(self, name: str, keys: list[str], *args: str | bytes | int | float) -> Any:
        """Run a script; its file is read once, and Redis is sent it again if it has lost it."""
        script = self._loaded.get(name)
        if script is None:
            folder = files(__package__) / "lua"
            text = "".join((folder / f"{part}.lua").read_text() for part in ("common", name))
            script = self._loaded[name] = self._redis.register_script(text)
        return await script(keys=keys or self._anchor, args=[self._prefix, GROUP, *args])
