"""The service on hosts of its own: links that are cut and healed, and a rolling upgrade."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chaos import upgrade
from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.hosts import Network, unavailable
from chaos.standin import Work
from chaos.submitting import submit
from reltrace_proto.v1 import types_pb2
from waiting import wait_until

pytestmark = pytest.mark.slow

StartOn = Callable[..., tuple[Cluster, Network]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartOn]:
    """Start a service on hosts that end with the test."""
    if (why := unavailable()) and not os.environ.get("CI"):
        pytest.skip(why)
    with ExitStack() as stack:

        def start(schedulers: int = 2, workers: int = 2, **options: Any) -> tuple[Cluster, Network]:
            network = stack.enter_context(Network(upgrade.hosts_of(schedulers, workers)))
            cluster = Cluster(
                tmp_path, schedulers=schedulers, workers=workers, network=network, **options
            )
            return stack.enter_context(cluster), network

        yield start


def test_a_worker_that_is_cut_off_costs_nothing_and_comes_back(start: StartOn) -> None:
    """
    Given two workers on hosts of their own, one of which runs a long job
    If the link of its host is cut until another has the job, and healed
    I expect every job to end once, the long one under its second attempt, and both
    workers to be there again.
    """
    cluster, network = start(lease=1.0)
    with cluster.client() as client:
        long = submit(client, [Work(1, milliseconds=1500)])
        wait_until(lambda: long.states() == ["LEASED"], "the long job is leased")
        (holder,) = {job.worker_id for job in long.jobs()}
        with network.cut(holder.partition(".")[0]):
            beside = submit(client, [Work(number) for number in range(2, 40)])
            (end,) = long.ends()
            assert {end.state for end in beside.ends()} == {types_pb2.JOB_STATE_SUCCEEDED}
        assert (end.state, end.attempt) == (types_pb2.JOB_STATE_SUCCEEDED, 2)
        wait_until(lambda: cluster.connected() == 2, "both workers are there")
    assert cluster.deaths == []


@pytest.mark.parametrize("host", ["redis", "scheduler0", "client"])
def test_a_link_that_is_cut_and_healed_loses_nothing(start: StartOn, host: str) -> None:
    """
    Given clients that keep submitting to two schedulers, all on hosts of their own
    If the link of Redis, of a scheduler, or of the clients is cut for as long as it takes
    to be noticed, and healed
    I expect them to go on, and every job to end once and as if nothing had been.
    """
    cluster, network = start(lease=1.0, max_lost_leases=100)
    clients = Clients(cluster, seed=5, raw=1)
    clients.wait_for_progress()
    with network.cut(host):
        clients.wait_for_silence(3.0) if host != "scheduler0" else clients.wait_for_progress()
    clients.wait_for_progress()
    tally = clients.finish()
    assert tally.faults == []
    assert tally.delivered == tally.accepted > 20


def test_a_rolling_upgrade_loses_nothing(start: StartOn) -> None:
    """
    Given two schedulers and two workers on hosts of their own, and clients that keep submitting
    If each is asked to end, and a new one is started in its place, one after another
    I expect every job to end once, no lease to be lost, and results to go on all the time.
    """
    # Whoever waited for a lease would be seen to.
    cluster, _ = start(lease=120.0)
    report = upgrade.run(cluster, [None], seed=7)
    assert report.faults == []
    assert report.delivered == report.jobs > 50
    assert report.lost == report.duplicates == report.differing == report.failed == 0
    assert report.leases_lost == 0
    assert report.longest_gap_between_results < 10
