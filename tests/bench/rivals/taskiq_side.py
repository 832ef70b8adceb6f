"""taskiq with taskiq-redis: the broker and the task; run as a script, the submitter.

Over a Redis stream: acknowledged when the result is saved, and what a dead worker held is
claimed by another.
"""

import asyncio
import os

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker
from turns import AT_ONCE, RESULT, serve_async

URL = os.environ["BENCH_REDIS"]
broker = RedisStreamBroker(URL, max_connection_pool_size=AT_ONCE).with_result_backend(
    RedisAsyncResultBackend(URL, result_ex_time=3600, max_connection_pool_size=AT_ONCE)
)


@broker.task(task_name="idle")
async def idle(ids: list[int]) -> str:
    return RESULT


async def main() -> None:
    await broker.startup()

    async def fetch(task: object) -> object:
        result = await task.wait_result(check_interval=0.1, timeout=60)
        result.raise_for_error()
        return result.return_value

    await serve_async("taskiq", lambda: idle.kiq([1, 2, 3, 4]), fetch)


if __name__ == "__main__":
    asyncio.run(main())
