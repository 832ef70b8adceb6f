"""Two versions side by side: the released commit's processes and these."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import upgrade
from chaos.cluster import Cluster

Start = Callable[..., Cluster]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("back", [False, True], ids=["upgraded", "put back and upgraded again"])
def test_versions_run_side_by_side(start: Start, tmp_path: Path, back: bool) -> None:
    """
    Given two schedulers and two workers of one version, and clients of both, under load
    If they are replaced one by one by those of the other, on the same keys
    I expect every job to end once with the right result, and no lease to be lost.
    """
    old = upgrade.released(tmp_path / "released")
    if old is None:
        pytest.skip(f"this clone has no commit {upgrade.RELEASED}")
    # Whoever waited for a lease would be seen to.
    cluster = start(lease=120.0)
    report = upgrade.mixed(cluster, old, seed=11, back=back)
    assert report.faults == []
    assert report.delivered == report.jobs > 50
    assert report.lost == report.duplicates == report.differing == report.failed == 0
    assert report.leases_lost == 0
