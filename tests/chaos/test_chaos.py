"""Everything may be killed at any moment, and what else happens to a service."""

from pathlib import Path

import pytest
from chaos.run import ACTORS, Report, run


def assert_nothing_is_wrong(report: Report) -> None:
    assert report.faults == []
    assert report.kills["all"] >= 20
    assert report.delivered == report.jobs > 100
    assert (report.lost, report.failed, report.duplicates, report.differing) == (0, 0, 0, 0)
    assert report.keys_left == []


@pytest.mark.timeout(240)
def test_nothing_is_lost_and_nothing_comes_twice(tmp_path: Path) -> None:
    """
    Given clients in processes of their own that keep submitting
    If workers, schedulers, Redis and clients are killed twenty times at random
    I expect every accepted job to end once, with the result of an undisturbed run, every chunk
    to be seen once, and nothing to be left in Redis.
    """
    report = run(tmp_path, kills=20, seed=20, actors=())
    assert_nothing_is_wrong(report)
    # Nothing but the process of Redis was killed: what it had answered was written.
    assert (report.submitted_again, report.read_again) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_nothing_is_lost_whatever_else_happens(tmp_path: Path, fsync: str) -> None:
    """
    Given the same under either policy of Redis, with twenty kills
    If every actor strikes at least once beside them
    I expect each to have proved that it did, and the same of every job.
    """
    report = run(tmp_path, kills=20, seed=21, fsync=fsync)
    assert_nothing_is_wrong(report)
    assert len(report.actors) == len(ACTORS)
    assert all(figures["strikes"] for figures in report.actors.values())
