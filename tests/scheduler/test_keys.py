"""Names of keys, and how shards are spread over a cluster."""

from collections import Counter

import pytest
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from reltrace_scheduler.keys import (
    Keys,
    partition,
    shard_of,
    submission_id,
    submission_of,
)


def node_of(key: str, nodes: int) -> int:
    """The node that has a key where nodes have equal and contiguous parts of the slots."""
    return key_slot(key.encode()) * nodes // REDIS_CLUSTER_HASH_SLOTS


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 12, 64])
def test_all_keys_of_a_shard_are_in_one_slot(shards: int) -> None:
    slots = set()
    for keys in partition(shards):
        names = (
            keys("virtual_time"),
            keys("queue", "batch:t:m"),
            keys("job", "s-0"),
            keys("worker", "w"),
            keys("done", "s"),
        )
        own = {key_slot(name.encode()) for name in names}
        assert len(own) == 1
        slots |= own
    assert len(slots) == shards


@pytest.mark.parametrize(("shards", "nodes"), [(2, 2), (3, 3), (12, 3), (8, 4), (64, 16)])
def test_nodes_have_equally_many_shards(shards: int, nodes: int) -> None:
    held = Counter(node_of(keys("virtual_time"), nodes) for keys in partition(shards))
    assert held == dict.fromkeys(range(nodes), shards // nodes)


def test_one_shard_has_the_keys_that_are_the_default() -> None:
    assert partition(1) == [Keys()]


@pytest.mark.parametrize("shard", [0, 1, 9, 1023])
def test_ids_tell_their_shard(shard: int) -> None:
    submission = submission_id("0a1b", shard)
    assert shard_of(submission) == shard
    assert shard_of(f"{submission}-17") == shard
    assert submission_of(f"{submission}-17") == submission
