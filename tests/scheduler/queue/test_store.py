"""Which Redis a scheduler takes for its own."""

import pytest
import redis.asyncio
from reltrace_scheduler.config import Settings
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.keys import SCHEMA, SCHEMA_VERSION, SHARDS
from reltrace_scheduler.queue import store as module
from reltrace_scheduler.queue.store import Store


async def test_keys_have_a_version(store: redis.asyncio.Redis, settings: Settings) -> None:
    await Store(store, settings).open()
    assert await store.get(SCHEMA) == str(SCHEMA_VERSION).encode()
    await Store(store, settings).open()


async def test_keys_of_a_newer_version_are_left_alone(
    store: redis.asyncio.Redis, settings: Settings
) -> None:
    await store.set(SCHEMA, SCHEMA_VERSION + 1)
    message = rf"of schema {SCHEMA_VERSION + 1}, and reltrace .* knows schema {SCHEMA_VERSION}:"
    with pytest.raises(StartError, match=message):
        await Store(store, settings).open()
    assert await store.keys() == [SCHEMA.encode()]


async def test_keys_without_a_version_are_of_the_first(
    store: redis.asyncio.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given keys from before there were versions
    I expect schedulers of the first schema to take them, and those of the second to refuse them.
    """
    await store.set(SHARDS, 1)
    await Store(store, settings).open()
    assert await store.get(SCHEMA) == b"1"
    await store.delete(SCHEMA)
    monkeypatch.setattr(module, "SCHEMA_VERSION", 2)
    with pytest.raises(StartError, match=r"of schema 1, and reltrace .* knows schema 2"):
        await Store(store, settings).open()
