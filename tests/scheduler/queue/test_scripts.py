"""The Lua scripts name keys as `keys.py` does, and only so."""

import re
from importlib.resources import files
from pathlib import Path
from typing import get_args

import pytest
import reltrace_scheduler.queue
from reltrace_scheduler.keys import Channel, EntityKey, Keys, SharedKey
from reltrace_scheduler.queue.shards import Shard, preamble

SCRIPTS = sorted(Path(str(files(reltrace_scheduler.queue))).glob("lua/*.lua"))
SHARED, OF_ENTITIES = set(get_args(SharedKey)), {*get_args(EntityKey), *get_args(Channel)}


def code(script: Path) -> str:
    return re.sub(r"--.*", "", script.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_takes_every_name_from_the_tables(script: Path) -> None:
    """
    Given a script without its comments
    I expect its keys to be those of the tables, KEYS that its head lists, or what it found in
    Redis, and none to be made from the prefix or from text of its own.
    """
    text = code(script)
    assert set(re.findall(r"\bkey\.(\w+)", text)) <= SHARED
    assert set(re.findall(r"\bprefix\.(\w+)", text)) <= OF_ENTITIES
    assert not re.search(r"ARGV\[1\]|reltrace|prefix *\.\.", text)
    # The first argument after the command is never a text.
    assert not re.search(r'redis\.call\("(?!XREADGROUP)\w+",\s*"(?!CREATE|DELCONSUMER)', text)
    assert ("-- KEYS: " in script.read_text()) == ("KEYS[" in text)


def test_python_and_lua_make_the_same_names() -> None:
    """The preamble gives a script each key once, in the order in which `Shard.run` passes them."""
    text, names = preamble(), get_args(SharedKey)
    found = dict(re.findall(r"(\w+) = KEYS\[#KEYS - (\d+)\]", text))
    assert {name: len(names) - 1 - int(place) for name, place in found.items()} == {
        name: place for place, name in enumerate(names)
    }
    prefixes = dict(re.findall(r'(\w+) = ARGV\[1\] \.\. "(\w+:)"', text))
    key = Keys()
    for name in get_args(EntityKey):
        assert key(name, "id") == f"{key.prefix}{prefixes[name]}id"


async def test_a_name_that_is_in_no_table_is_an_error(driver) -> None:
    shard: Shard = driver.shard
    script = shard.redis.register_script(preamble() + 'return redis.call("GET", key.typo)')
    with pytest.raises(Exception, match="Lua redis"):
        await script(keys=[shard.key("load")], args=[shard.key.prefix])
