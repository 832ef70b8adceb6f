"""dramatiq: the task, for its worker; run as a script, the submitter.

Its Redis broker acknowledges after the work, and gives what a dead worker held to another.
"""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from turns import RESULT, serve

URL = os.environ["BENCH_REDIS"]
broker = RedisBroker(url=URL)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def idle(ids: list[int]) -> str:
    return RESULT


if __name__ == "__main__":
    serve(
        "dramatiq",
        lambda jobs: [idle.send([1, 2, 3, 4]) for _ in range(jobs)],
        lambda messages: [message.get_result(block=True, timeout=60_000) for message in messages],
    )
