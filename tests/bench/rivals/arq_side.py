"""arq: the task and its worker's settings; run as a script, the submitter.

A job stays in its queue until it has run, so that a dead worker's jobs run again.
"""

import asyncio
import os

from arq import create_pool
from arq.connections import RedisSettings
from turns import AT_ONCE, RESULT, serve_async

SETTINGS = RedisSettings(
    unix_socket_path=os.environ["BENCH_REDIS"].removeprefix("unix://"),
    max_connections=2 * AT_ONCE,
)


async def idle(ctx: dict, ids: list[int]) -> str:
    return RESULT


class WorkerSettings:
    functions = (idle,)
    redis_settings = SETTINGS
    # The defaults wait half a second between looks and run ten jobs at a time.
    poll_delay = 0.01
    max_jobs = AT_ONCE
    queue_read_limit = AT_ONCE


async def main() -> None:
    pool = await create_pool(SETTINGS)
    await serve_async(
        "arq",
        lambda: pool.enqueue_job("idle", [1, 2, 3, 4]),
        lambda job: job.result(timeout=60, poll_delay=0.1),
    )


if __name__ == "__main__":
    asyncio.run(main())
