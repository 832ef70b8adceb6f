"""What can be lost, row by row of the table in scheduler/README.md: who uses the SDK lacks nothing.

Real schedulers, Redis servers and Sentinels; the workers compute results that are known beforehand.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import reltrace
from chaos.standin import Work
from e2e.conftest import START, Process, wait_until
from redis_cluster import redis_cluster
from redis_failover import SERVICE, RedisNode, Service, redis_nodes, sentinels

pytestmark = pytest.mark.slow
Start = Callable[..., Process]

TESTS = Path(__file__).parents[1]
JOBS, AT = 300, 60


@dataclass
class Caller:
    """Calls over the SDK, whose results are checked."""

    client: reltrace.Client
    pool: ThreadPoolExecutor

    def run(self, event: Callable[[], None]) -> None:
        """Trace jobs; `event` happens when the results of some have come."""
        works = [Work(number, 64, milliseconds=5) for number in range(JOBS)]
        items = [{"input_ids": work.ids, "id": work.number} for work in works]
        seen: Counter[int] = Counter()
        for result in self.client.trace_many(items, max_in_flight=64, timeout=200):
            assert isinstance(result, reltrace.Trace), result
            assert result.relevance.tobytes() == works[result.id].data
            seen[result.id] += 1
            if seen.total() == AT:
                event()
        assert seen == Counter(range(JOBS))

    def submit(self, node: RedisNode, count: int = 5) -> list[Future[None]]:
        """Begin further calls; wait until a Redis has their jobs."""
        before = submissions(node.admin)
        calls = [self.pool.submit(self._one, JOBS + number) for number in range(count)]
        wait_until(lambda: len(submissions(node.admin) - before) >= count, "the jobs are accepted")
        return calls

    def _one(self, number: int) -> None:
        work = Work(number, 64, milliseconds=500)
        trace = self.client.trace(input_ids=work.ids, timeout=200)
        assert trace.relevance.tobytes() == work.data


def submissions(admin: redis.Redis) -> set[bytes]:
    return set(admin.scan_iter(match="reltrace:{0}:submission:*", count=1000))


@pytest.fixture
def caller(start: Start) -> Iterator[Callable[..., Caller]]:
    """Make a caller of a scheduler over a Redis, with a worker."""
    clients: list[reltrace.Client] = []
    processes: list[Process] = []
    with ThreadPoolExecutor(8) as pool:

        def make(url: str, *options: str) -> Caller:
            scheduler = start(
                "reltrace_scheduler", "--listen", "127.0.0.1:0", "--redis", url, "--lease", "2",
                *options,
            )  # fmt: skip
            address = scheduler.first_line().split()[-1]
            path = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
            worker = start(
                "chaos.worker", "--server", address, "--name", "w", "--jobs-per-pass", "4",
                PYTHONPATH=path,
            )  # fmt: skip
            processes.extend((worker, scheduler))
            client = reltrace.Client(address, retry_timeout=100)
            clients.append(client)
            wait_until(lambda: len(client.models()) == 1, "the model is served", START)
            return Caller(client, pool)

        yield make
        for client in clients:
            client.close()
        for process in processes:
            # Their Redis is gone: they would wait for it.
            process.kill()


def lost(caplog: pytest.LogCaptureFixture) -> int:
    """Count the times that the SDK found that accepted jobs had been lost."""
    return sum("has lost" in record.message for record in caplog.records)


def finish(calls: Sequence[Future[None]]) -> None:
    for call in calls:
        call.result(200)


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_redis_is_killed(
    caller: Callable[..., Caller], tmp_path: Path, fsync: str, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_nodes(tmp_path, 1, "--appendfsync", fsync) as (node,):
        it = caller(node.url)

        def event() -> None:
            calls.extend(it.submit(node))
            node.kill()
            node.mend_file()
            node.start()

        calls: list[Future[None]] = []
        it.run(event)
        finish(calls)
    # With `everysec`, a slow disk loses some.
    assert fsync == "everysec" or not lost(caplog)


def test_the_machine_of_redis_loses_power(
    caller: Callable[..., Caller], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given a Redis whose file lacks, after a crash, all that was written last
    I expect the jobs that were accepted meanwhile to be lost, and submitted again.
    """
    with redis_nodes(tmp_path, 1, "--appendfsync", "everysec") as (node,):
        it = caller(node.url)

        def event() -> None:
            size = node.file.stat().st_size
            calls.extend(it.submit(node))
            node.kill()
            os.truncate(node.file, size)
            node.mend_file()
            node.start()

        calls: list[Future[None]] = []
        it.run(event)
        finish(calls)
    assert lost(caplog) >= 5


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_replica_is_promoted_under_load(
    caller: Callable[..., Caller], tmp_path: Path, replicas: int, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Given a replica that is cut off from its primary, some time before that is killed
    If it is promoted, I expect the last submissions to be lost, and submitted again by the SDK; if
    the scheduler waits for a replica, none to be lost. Callers get each result once either way.
    """
    with (
        redis_nodes(tmp_path, 3) as (primary, replica, other),
        Service(primary.port).serving() as service,
    ):
        replica.follow(primary)
        it = caller(service.url, "--redis-replicas", str(replicas))

        def event() -> None:
            replica.admin.replicaof("NO", "ONE")
            calls.extend(it.submit(primary))
            primary.kill()
            service.target = replica.port
            other.follow(replica)

        calls: list[Future[None]] = []
        it.run(event)
        finish(calls)
    assert lost(caplog) == 0 if replicas else lost(caplog) >= 5


def test_sentinels_promote_a_replica_under_load(
    caller: Callable[..., Caller], tmp_path: Path
) -> None:
    with redis_nodes(tmp_path, 2) as (primary, replica):
        replica.follow(primary)
        with sentinels(tmp_path, primary, 3, quorum=2) as ports:
            hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
            caller(f"redis+sentinel://{hosts}/{SERVICE}").run(primary.kill)
        assert replica.admin.info("replication")["role"] == "master"


def test_a_replica_of_a_cluster_takes_over_under_load(caller: Callable[..., Caller]) -> None:
    with redis_cluster(3, replicas=1) as nodes:
        primary, replica = nodes[0], nodes[3]
        url = f"redis://127.0.0.1:{nodes[1].port},127.0.0.1:{primary.port}"
        caller(url, "--shards", "3").run(lambda: os.kill(primary.pid, signal.SIGKILL))
        with redis.Redis(port=replica.port) as admin:
            assert admin.info("replication")["role"] == "master"
