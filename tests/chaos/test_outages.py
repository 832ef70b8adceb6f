"""Redis is away for a while: everyone waits and goes on."""

import asyncio
import time
from collections.abc import Callable

import pytest
from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.standin import Work
from chaos.submitting import submit
from redis.asyncio import Redis
from reltrace_proto.v1 import types_pb2
from scheduler.redis_states import RedisStates
from waiting import wait_until

Start = Callable[..., Cluster]

LEASE = 1.0


def test_redis_does_not_answer_for_longer_than_a_lease(start: Start) -> None:
    cluster = start(lease=LEASE)
    clients = Clients(cluster, seed=4, raw=1)
    clients.wait_for_progress()
    with cluster.redis.paused():
        # Not a wait for anything: this is how long Redis is away.
        time.sleep(2.5 * LEASE)
    clients.wait_for_progress()
    tally = clients.finish()
    assert tally.faults == []
    assert tally.delivered == tally.accepted > 50


@pytest.mark.slow
@pytest.mark.parametrize("state", ["OOM", "READONLY", "MISCONF", "NOREPLICAS"])
def test_redis_takes_no_writes_for_longer_than_a_lease(start: Start, state: str) -> None:
    """
    Given clients and workers at work
    If Redis is full, demoted, can not save, or lacks its replicas, for longer than a lease
    I expect nothing to be lost or to end with an error, and a few lines in the schedulers' logs.
    """
    cluster = start(lease=LEASE)
    clients = Clients(cluster, seed=6, raw=1)
    clients.wait_for_progress()
    deaths = len(cluster.deaths)

    async def pass_through() -> None:
        (node,) = cluster.redis_nodes
        async with Redis(unix_socket_path=str(node.socket)) as client:
            states = RedisStates(client, cluster.folder / node.name)
            await states.enter(state)
            await asyncio.sleep(2.5 * LEASE)
            await states.leave(state)

    asyncio.run(pass_through())
    clients.wait_for_progress()
    tally = clients.finish()
    assert tally.faults == []
    assert tally.delivered == tally.accepted > 50
    assert len(cluster.deaths) == deaths
    for scheduler in cluster.schedulers:
        log = scheduler.log.read_text()
        assert "Traceback" not in log
        assert log.count(state) < 20, log


def test_redis_is_ended_in_order_and_started_again(start: Start) -> None:
    cluster = start(lease=LEASE)
    clients = Clients(cluster, seed=5, raw=1)
    for _ in range(2):
        clients.wait_for_progress()
        with cluster.redis.down():
            time.sleep(1.5 * LEASE)
    clients.wait_for_progress()
    tally = clients.finish()
    assert tally.faults == []
    assert tally.delivered == tally.accepted > 50


def test_an_outage_is_not_held_against_the_jobs_that_run(start: Start) -> None:
    """
    Given a job that runs for long, on a worker that lives all the time
    If Redis is away three times, each time for longer than a lease
    I expect the job to run once: its worker could not renew the lease, but was not lost.
    """
    cluster = start(lease=LEASE)
    with cluster.client() as client:
        long = submit(client, [Work(1, milliseconds=9000)])
        wait_until(lambda: long.states() == ["LEASED"], "the job is leased")
        for _ in range(3):
            with cluster.redis.paused():
                time.sleep(1.5 * LEASE)
            with cluster.store() as store:
                wait_until(store.ping, "Redis answers")
            (end,) = submit(client, [Work(2)]).ends()
            assert end.state == types_pb2.JOB_STATE_SUCCEEDED
        (end,) = long.ends()
    assert (end.state, end.attempt) == (types_pb2.JOB_STATE_SUCCEEDED, 1)


def test_no_scheduler_for_longer_than_a_lease(start: Start) -> None:
    """
    Given a job that runs for long
    If all schedulers are away for longer than a lease
    I expect the job to run once, and its result to be stored by the scheduler that comes.
    """
    cluster = start(lease=LEASE, workers=1)
    with cluster.client() as client:
        long = submit(client, [Work(1, milliseconds=3000)])
        wait_until(lambda: long.states() == ["LEASED"], "the job is leased")
        with cluster.schedulers[0].down(), cluster.schedulers[1].down():
            time.sleep(1.5 * LEASE)
        wait_until(lambda: cluster.connected() == 1, "the worker comes back")
        (end,) = long.ends()
    assert (end.state, end.attempt) == (types_pb2.JOB_STATE_SUCCEEDED, 1)
    assert cluster.workers[0].log.read_text().count("runs 1\n") == 1
