"""The shards of the queue, and the Lua scripts over them."""

import hashlib
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import Any, get_args

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError, RedisError

from reltrace_scheduler.keys import (
    GROUP,
    REAPER,
    Channel,
    EntityKey,
    Keys,
    SharedKey,
    partition,
    shard_of,
)
from reltrace_scheduler.queue.replication import confirmed

Argument = str | bytes | int | float

_AT_ONCE = 256
"""Rows of one script call: bounds how long it holds Redis."""


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def preamble() -> str:
    """Return the Lua that gives scripts the names of `keys.py`, as `common.lua` describes them.

    The shared keys end KEYS, in the order of `SharedKey`. ARGV[1] is the prefix of all keys.
    """
    shared, of_entities = get_args(SharedKey), (*get_args(EntityKey), *get_args(Channel))
    keys = ", ".join(f"{name} = KEYS[#KEYS - {n}]" for n, name in enumerate(reversed(shared)))
    prefixes = ", ".join(f'{name} = ARGV[1] .. "{name}:"' for name in of_entities)
    return (
        f"local key = {{{keys}}}\nlocal prefix = {{{prefixes}}}\n"
        f'local GROUP, REAPER = "{GROUP}", "{REAPER}"\n'
    )


def _load(redis: Redis, name: str) -> AsyncScript:
    """Return one of the `.lua` files; each says at its head what it takes and gives."""
    folder = files(__package__) / "lua"
    texts = [(folder / f"{part}.lua").read_text() for part in ("common", name)]
    return redis.register_script("".join((preamble(), *texts)))


class Shard:
    """One part of the queue: all its keys have one hash tag."""

    def __init__(
        self, redis: Redis, load: Callable[[str], AsyncScript], key: Keys, replicas: int
    ) -> None:
        self.redis = redis
        self.key = key
        self._load = load
        self._replicas = replicas
        self._shared_keys = [key(name) for name in get_args(SharedKey)]

    async def run(
        self, script: str, keys: Sequence[str], *args: Argument, replicated: bool = False
    ) -> Any:
        """Run a script; `keys` are those that its head numbers.

        With `replicated`, wait until `--redis-replicas` have what it wrote. It may run twice then.
        """
        keys = [*keys, *self._shared_keys]
        loaded, rest = self._load(script), (len(keys), *keys, self.key.prefix, *args)
        if not replicated or not self._replicas:
            return await self._run(loaded, *rest)
        call = partial(
            confirmed, self.redis, self.key("replicated"), self._replicas, "EVALSHA", loaded.sha
        )
        try:
            return await call(*rest)
        except RedisError:
            # This finds the primary, and brings the script there.
            await self._run(loaded, *rest)
            return await call(*rest)

    async def _run(self, script: AsyncScript, *rest: Any) -> Any:
        try:
            return await self.redis.evalsha(script.sha, *rest)
        except NoScriptError:
            # In one step, since a replica may take over between two.
            return await self.redis.eval(str(script.script), *rest)

    async def queues(self) -> list[bytes]:
        names: Any = await self.redis.smembers(self.key("queues"))
        return sorted(names)

    async def now(self) -> int:
        """Return the Unix time in milliseconds by the clock of the shard's node."""
        return int(await self.run("now", []))


class Shards:
    """All parts of the queue.

    A submission is in one of them with all its jobs and results, so only listings and sums read
    several. Its idempotency key determines which one; without a key it is chosen at random.
    """

    def __init__(self, redis: Redis, count: int, replicas: int = 0) -> None:
        self.redis = redis
        load = cache(partial(_load, redis))
        self.all = tuple(Shard(redis, load, key, replicas) for key in partition(count))

    def of(self, some_id: str) -> Shard:
        """Return the shard of a submission or job; an id that names none belongs to the first."""
        number = shard_of(some_id)
        return self.all[number if number < len(self.all) else 0]

    def for_submission(self, tenant: str, idempotency_key: str) -> Shard:
        """Return the shard of a new submission; the same key gives the same shard."""
        choice = f"{tenant} {idempotency_key}" if idempotency_key else secrets.token_hex(8)
        digest = hashlib.blake2b(choice.encode(), digest_size=8).digest()
        return self.all[int.from_bytes(digest, "little") % len(self.all)]

    async def run(
        self,
        script: str,
        rows: Sequence[tuple[Argument, ...]],
        *args: Argument,
        replicated: bool = False,
    ) -> list[Any]:
        """Run a script over rows that begin with a job id, each in the shard of its job.

        The script takes `args` and then the rows, and answers with one value per row; returns
        these in the order of the rows.
        """
        indices: dict[Shard, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            indices[self.of(str(row[0]))].append(index)
        answers: list[Any] = [None] * len(rows)
        for shard, positions in indices.items():
            for start in range(0, len(positions), _AT_ONCE):
                page = positions[start : start + _AT_ONCE]
                values = [value for index in page for value in rows[index]]
                found = await shard.run(script, [], *args, *values, replicated=replicated)
                for index, answer in zip(page, found, strict=True):
                    answers[index] = answer
        return answers
