"""Long jobs, deadly jobs, and workers that leave."""

from collections.abc import Callable

from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.standin import Work
from chaos.submitting import submit
from reltrace_proto.v1 import types_pb2
from reltrace_worker.session.lifecycle import HANGS
from waiting import wait_until

Start = Callable[..., Cluster]

SUCCEEDED = types_pb2.JOB_STATE_SUCCEEDED


def test_a_job_longer_than_ten_leases_runs_once(start: Start) -> None:
    """
    Given a lease of half a second and two workers
    If a pass takes ten leases and more
    I expect its job to run once, under its first attempt, and so all that wait for it.
    """
    cluster = start(lease=0.5)
    with cluster.client() as client:
        long = submit(client, [Work(1, milliseconds=5500)])
        wait_until(lambda: long.states() == ["LEASED"], "the long job is leased")
        # Some of them are leased to the same worker and wait for its pass, leased all the time.
        beside = submit(client, [Work(number) for number in range(2, 40)])
        assert {(end.state, end.attempt) for end in beside.ends()} == {(SUCCEEDED, 1)}
        (end,) = long.ends()
    assert (end.state, end.attempt) == (SUCCEEDED, 1)
    assert sum(part.log.read_text().count("runs 1\n") for part in cluster.workers) == 1


def test_a_job_that_kills_its_workers_costs_nobody_else(start: Start) -> None:
    """
    Given a job that kills the process it runs in, and others leased beside it
    If it has killed three workers
    I expect it to be quarantined, with the history of its losses, and the others to succeed.
    """
    cluster = start(lease=0.5, schedulers=1)
    works = [Work(number, deadly=number == 7) for number in range(40)]
    with cluster.client() as client:
        ends = submit(client, works).ends()
        # Whoever comes after is served.
        (after,) = submit(client, [Work(100)]).ends()
    deadly = ends.pop(7)
    assert deadly.state == types_pb2.JOB_STATE_QUARANTINED
    assert [lost.attempt for lost in deadly.lost_leases] == [1, 2, 3]
    assert len({lost.worker_id for lost in deadly.lost_leases}) == 3
    assert {end.state for end in ends} == {SUCCEEDED}
    # Those beside it ran once more, in peace.
    assert max(end.attempt for end in ends) <= 3
    assert after.state == SUCCEEDED
    assert len(cluster.deaths) == 3


def test_a_job_that_hangs_its_workers_costs_nobody_else(start: Start) -> None:
    """
    Given a job whose pass never ends, while its worker's heartbeats go on, and others behind it
    If two workers have found their engine to stand still, and have left
    I expect it to be quarantined, with the history of its losses, and the others to succeed.
    """
    # Two: those that are handed back along with it must not count.
    cluster = start(lease=1.0, schedulers=1, max_lost_leases=2, jobs_per_pass=1)
    works = [Work(number, endless=number == 7) for number in range(40)]
    with cluster.client() as client:
        ends = submit(client, works).ends()
        (after,) = submit(client, [Work(100)]).ends()
    endless = ends.pop(7)
    assert endless.state == types_pb2.JOB_STATE_QUARANTINED
    assert [lost.attempt for lost in endless.lost_leases] == [1, 2]
    assert len({lost.worker_id for lost in endless.lost_leases}) == 2
    assert {end.state for end in ends} == {SUCCEEDED}
    assert after.state == SUCCEEDED
    assert [death.code for death in cluster.deaths] == [HANGS] * 2


def test_a_worker_that_hangs_while_it_drains_leaves_without_its_grace(start: Start) -> None:
    """
    Given a worker whose pass hangs
    If it is asked to stop, and has ten seconds for its pass
    I expect it to find the pass to hang and to leave, with the lease of its job counted as lost.
    """
    cluster = start(lease=1.0, schedulers=1, workers=1, max_lost_leases=1)
    (worker,) = cluster.workers
    with cluster.client() as client:
        submitted = submit(client, [Work(1, endless=True)])
        wait_until(lambda: "runs 1\n" in worker.log.read_text(), "the pass hangs")
        assert worker.stop() == HANGS
        (end,) = submitted.ends()
    assert end.state == types_pb2.JOB_STATE_QUARANTINED
    assert "worker.drains" in worker.log.read_text()


def test_draining_under_load_loses_nothing_and_no_time(start: Start) -> None:
    """
    Given a lease of two minutes, so that whoever waited for one would be seen to
    If workers are asked to stop, one after another, while clients keep submitting
    I expect each to end in order and all jobs to end soon, each of them at most handed
    back by both: no lease was waited for.
    """
    cluster = start(lease=120.0, workers=3)
    clients = Clients(cluster, seed=3, raw=1)
    for worker in cluster.workers[:2]:
        clients.wait_for_progress()
        assert worker.stop() == 0
    clients.wait_for_progress()
    tally = clients.finish()
    assert tally.faults == []
    assert tally.delivered == tally.accepted > 50
    assert set(tally.attempts) <= {1, 2, 3}
