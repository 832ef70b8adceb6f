"""Writes that replicas have confirmed."""

from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import PipelineCommand

from reltrace_scheduler.errors import NotReplicatedError

_PATIENCE = 1000
"""Milliseconds that replicas have to confirm."""


async def confirmed(redis: Redis, key: str, replicas: int, *script: Any) -> Any:
    """Call a script on the node of a key, and wait until replicas have what it wrote.

    Parameters
    ----------
    key : str
        It is set: Redis waits for what its connection wrote last, and a script that is repeated
        writes nothing.
    script
        The command that calls it.

    Raises
    ------
    NotReplicatedError
        The script has run, but fewer replicas have confirmed. It may be lost with the primary.
    RedisError
        It may have run or not.
    """
    # On one connection, so that both answers are of the same server.
    commands = (script, ("SET", key, ""), ("WAIT", replicas, _PATIENCE))
    if isinstance(redis, RedisCluster):
        # A pipeline of a cluster can not send WAIT to the node of a key.
        node = redis.get_node_from_key(key)
        assert node is not None
        sent = [PipelineCommand(number, *command) for number, command in enumerate(commands)]
        await node.execute_pipeline(sent)
        answers = [command.result for command in sent]
    else:
        pipe = redis.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        answers = await pipe.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    answer, _, count = answers
    if count < replicas:
        raise NotReplicatedError(count, replicas)
    return answer
