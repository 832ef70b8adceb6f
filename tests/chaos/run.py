"""Keeps submitting while everything is killed, then watches Redis' memory; prints one JSON object.

python tests/chaos/run.py                       # 1,000 kills, 50,000 jobs: minutes
python tests/chaos/run.py --kills 20 --memory-jobs 1000 --seed 7 --fsync everysec
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos.actors import Actors
from chaos.checks import Tally
from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.flood_actor import Flood
from chaos.killer import Killer
from chaos.memory import measure
from chaos.process_actors import ClockJump, CutLink, HungEngine
from chaos.redis_actors import LATE, FullRedis, PausedRedis, Promotion

ACTORS = {
    actor.name.replace(" ", "-"): actor
    for actor in (PausedRedis, FullRedis, Promotion, HungEngine, CutLink, ClockJump, Flood)
}
"""By the names that the command line takes."""

_UNWRITTEN = 3.0
"""Seconds before a SIGKILL of Redis whose answers may be lost with `everysec`.

While its disk syncs, Redis answers and writes up to two seconds later.
"""

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
    submitted_again: int
    sdk_submitted_again: int
    read_again: int
    ended_and_lost: int
    submissions_read_twice: int
    attempts: dict[int, int]
    actors: dict[str, dict[str, int]]
    longest_wait_for_a_result: float
    longest_wait_beside_a_flood: float
    most_jobs_of_a_flood_before_another: int
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
    actors: Sequence[str] = tuple(ACTORS),
) -> Report:
    """Run a service in a folder, kill its parts and let actors strike."""
    began = time.monotonic()
    with Cluster(
        folder,
        workers=workers,
        lease=lease,
        fsync=fsync,
        # Workers die so often here that a slow job may well lose three by chance.
        max_lost_leases=1000,
        for_actors=True,
    ) as cluster:
        clients = Clients(cluster, seed, raw_clients)
        killer = Killer(
            lambda: {
                "worker": cluster.workers,
                "scheduler": cluster.schedulers,
                "redis": [cluster.redis],
                "client": clients.raw,
            },
            WEIGHTS,
            clients.progress,
            seed,
        )
        acting = [ACTORS[name](cluster) for name in actors]
        with Actors(acting, clients.progress, seed):
            killer.run(kills)
        killer.write_log(folder / "kills.log")
        tally = Tally(losses=[loss for actor in acting for loss in actor.losses])
        if fsync == "everysec":
            tally.losses += [(at - _UNWRITTEN, at + LATE) for at in killer.times("redis")]
        for actor in acting:
            actor.settle(tally)
        clients.finish(tally)
    floods = [actor for actor in acting if isinstance(actor, Flood)]
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
        submitted_again=tally.submitted_again,
        sdk_submitted_again=tally.sdk_submitted_again,
        read_again=tally.read_again,
        ended_and_lost=tally.ended_and_lost,
        submissions_read_twice=tally.reread,
        attempts=dict(sorted(tally.attempts.items())),
        actors={actor.name: dict(actor.figures) for actor in acting},
        longest_wait_for_a_result=round(killer.longest_stall, 1),
        longest_wait_beside_a_flood=round(max((one.longest_wait for one in floods), default=0), 1),
        most_jobs_of_a_flood_before_another=max((one.most_before for one in floods), default=0),
        keys_left=tally.keys_left,
        faults=tally.faults,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--memory-jobs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fsync", choices=("always", "everysec", "no"), default="always")
    parser.add_argument("--actors", nargs="*", choices=tuple(ACTORS), default=tuple(ACTORS))
    parser.add_argument("--folder", type=Path, help="keeps logs and journals")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given_folder = given.folder or Path(folder)
        report = run(
            given_folder / "kills", kills=given.kills, seed=given.seed, fsync=given.fsync,
            actors=given.actors,
        )  # fmt: skip
        with Cluster(given_folder / "memory", schedulers=1) as cluster:
            memory = measure(cluster, given.memory_jobs)
    print(json.dumps(asdict(report) | {"memory": asdict(memory)}, indent=2))
    sys.exit(bool(report.faults or not memory.flat))


if __name__ == "__main__":
    main()
