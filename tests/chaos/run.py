"""Keeps submitting while everything is killed; prints one JSON object.

python tests/chaos/run.py                       # 200 kills: minutes
python tests/chaos/run.py --kills 20 --seed 7
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

from chaos import checks
from chaos.cluster import Cluster, Part
from chaos.killer import Killer
from waiting import wait_until

WEIGHTS = {"worker": 0.4, "scheduler": 0.25, "redis": 0.15, "client": 0.2}

_FINISH = 60.0
"""Seconds for the clients to finish what they began, once the killing is over."""


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
    workers: int = 2,
    raw_clients: int = 2,
) -> Report:
    """Run a service in a folder and kill its parts."""
    began = time.monotonic()
    with Cluster(folder, workers=workers, lease=lease, fsync=fsync) as cluster:
        journals: dict[str, Path] = {}
        until = folder / "until"

        def client(kind: str, index: int) -> Part:
            name = f"{kind}{index}"
            journals[name] = folder / f"{name}.jsonl"
            return cluster.start_module(
                name, f"chaos.{kind}",
                "--server", cluster.address(index), "--journal", str(journals[name]),
                "--seed", str(seed * 100 + len(journals)), "--until", str(until),
            )  # fmt: skip

        raw = [client("raw_client", index) for index in range(raw_clients)]
        sdk = client("sdk_client", raw_clients)
        killer = Killer(
            {
                "worker": cluster.workers,
                "scheduler": cluster.schedulers,
                "redis": [cluster.redis],
                "client": raw,
            },
            WEIGHTS,
            lambda: sum(path.stat().st_size for path in journals.values() if path.exists()),
            seed,
        )
        killer.run(kills)
        until.touch()
        tally = checks.Tally()
        for part in (*raw, sdk):
            if (code := part.finish(_FINISH)) != 0:
                tally.fault(part.name, f"ended with {code}: {part.last_words()}")
        wait_until(lambda: cluster.connected() == workers, "all workers come back", _FINISH)
        for name, path in journals.items():
            (checks.raw if name.startswith("raw") else checks.sdk)(path, tally)
        for death in (*cluster.deaths, *(death for part in (*raw, sdk) for death in part.deaths)):
            # A scheduler that starts while Redis is away says so and ends.
            if "can not be reached" not in death.last_words:
                tally.fault(death.part, f"ended by itself with {death.code}: {death.last_words}")
        with cluster.store() as store:
            left = checks.remaining_keys(store, {part.name for part in cluster.workers})
            balance = checks.balance(store)
        calm = {"queued": 0, "leased": 0, "jobs": 0, "bytes": 0, "SUCCEEDED": tally.accepted}
        if balance != calm:
            tally.fault("store", f"holds {balance} and not {calm}")
        if left:
            tally.fault("store", f"{len(left)} keys are left: {left[:5]}")
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
        differing=tally.differing,
        submissions_read_twice=tally.reread,
        attempts=dict(sorted(tally.attempts.items())),
        longest_wait_for_a_result=round(killer.longest_stall, 1),
        keys_left=left,
        faults=tally.faults,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fsync", choices=("always", "everysec", "no"), default="always")
    parser.add_argument("--folder", type=Path, help="keeps logs and journals")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given_folder = given.folder or Path(folder)
        given_folder.mkdir(parents=True, exist_ok=True)
        report = run(given_folder, kills=given.kills, seed=given.seed, fsync=given.fsync)
    print(json.dumps(asdict(report), indent=2))
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
