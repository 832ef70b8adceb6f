"""Everything may be killed at any moment."""

from pathlib import Path

import pytest
from chaos.run import run


@pytest.mark.timeout(240)
def test_nothing_is_lost_and_nothing_comes_twice(tmp_path: Path) -> None:
    """
    Given clients in processes of their own that keep submitting
    If workers, schedulers, Redis and clients are killed twenty times at random
    I expect every accepted job to end once, with the result of an undisturbed run, every chunk
    to be seen once, and nothing to be left in Redis.
    """
    report = run(tmp_path, kills=20, seed=20)
    assert report.faults == []
    assert report.kills["all"] >= 20
    assert report.delivered == report.jobs > 100
    assert (report.lost, report.failed, report.duplicates, report.differing) == (0, 0, 0, 0)
    assert report.keys_left == []
