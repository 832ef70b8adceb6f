"""Keeps submitting while everything is killed, then watches Redis' memory; prints one JSON object.

python tests/chaos/run.py                       # 200 kills, 50,000 jobs: minutes
python tests/chaos/run.py --kills 20 --memory-jobs 1000 --seed 7
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.killer import Killer
from chaos.memory import measure

WEIGHTS = {"worker": 0.4, "scheduler": 0.25, "redis": 0.15, "client": 0.2}


@dataclass
class Report:
    """Figures of one run; `faults` says in words what went wrong."""

    seed: int
    seconds: float
    fsync: str
    lease: float
    kills: dict[str, int]
    jobs: int
    delivered: int
    chunks: int
    lost: int
    duplicates: int
    failed: int
    differing: int
    submissions_read_twice: int
    attempts: dict[int, int]
    longest_wait_for_a_result: float
    keys_left: list[str]
    faults: list[str]


def run(
    folder: Path,
    *,
    kills: int,
    seed: int,
    fsync: str = "always",
    lease: float = 1.0,
    workers: int = 3,
    raw_clients: int = 2,
) -> Report:
    """Run a service in a folder and kill its parts."""
    began = time.monotonic()
    with Cluster(
        folder,
        workers=workers,
        lease=lease,
        fsync=fsync,
        # Workers die so often here that a slow job may well lose three by chance.
        max_lost_leases=1000,
    ) as cluster:
        clients = Clients(cluster, seed, raw_clients)
        killer = Killer(
            {
                "worker": cluster.workers,
                "scheduler": cluster.schedulers,
                "redis": [cluster.redis],
                "client": clients.raw,
            },
            WEIGHTS,
            clients.progress,
            seed,
        )
        killer.run(kills)
        tally = clients.finish()
        killer.write_log(folder / "kills.log")
    return Report(
        seed=seed,
        seconds=round(time.monotonic() - began, 1),
        fsync=fsync,
        lease=lease,
        kills={**killer.kills, "all": killer.kills.total()},
        jobs=tally.accepted,
        delivered=tally.delivered,
        chunks=tally.chunks,
        lost=tally.lost,
        duplicates=tally.duplicates,
        failed=tally.failed,
        differing=tally.differing,
        submissions_read_twice=tally.reread,
        attempts=dict(sorted(tally.attempts.items())),
        longest_wait_for_a_result=round(killer.longest_stall, 1),
        keys_left=tally.keys_left,
        faults=tally.faults,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--memory-jobs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fsync", choices=("always", "everysec", "no"), default="always")
    parser.add_argument("--folder", type=Path, help="keeps logs and journals")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given_folder = given.folder or Path(folder)
        report = run(given_folder / "kills", kills=given.kills, seed=given.seed, fsync=given.fsync)
        with Cluster(given_folder / "memory", schedulers=1) as cluster:
            memory = measure(cluster, given.memory_jobs)
    print(json.dumps(asdict(report) | {"memory": asdict(memory)}, indent=2))
    sys.exit(bool(report.faults or not memory.flat))


if __name__ == "__main__":
    main()
