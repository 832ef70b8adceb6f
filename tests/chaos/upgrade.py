"""Replaces schedulers and workers one by one while clients keep submitting; prints a JSON object.

python tests/chaos/upgrade.py                   # every part five times, by itself
python tests/chaos/upgrade.py --rounds 1 --hosts   # on hosts of network namespaces, as root
python tests/chaos/upgrade.py --released        # from the released commit to these sources
python tests/chaos/upgrade.py --released --back # from these to the released, and again to these
python tests/chaos/upgrade.py --released --kills 80   # half of each, and what is killed so often
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpc
from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.hosts import Network
from chaos.killer import Killer
from chaos.part import TESTS, Part
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc
from waiting import wait_until

RELEASED = "9e912bd"
"""The commit that was released last, or before the first release the one before the changes: its
protocol is `proto/released.binpb`."""

_END = 60.0
"""Seconds for a part to end in order, and for its successor to be there."""


@dataclass
class Report:
    """Figures of one run; `faults` says in words what went wrong."""

    seconds: float
    replaced: dict[str, int]
    kills: dict[str, int]
    jobs: int
    delivered: int
    lost: int
    duplicates: int
    differing: int
    failed: int
    attempts: dict[int, int]
    leases_lost: int
    longest_gap_between_results: float
    faults: list[str]


def hosts_of(schedulers: int, workers: int) -> list[str]:
    """Return the hosts of a service: every part has one, and all clients together."""
    return [
        "redis",
        "client",
        *(f"scheduler{index}" for index in range(schedulers)),
        *(f"worker{index}" for index in range(workers)),
    ]


def versions(cluster: Cluster) -> dict[str, str]:
    """Return the version of every connected worker, by its id."""
    with grpc.insecure_channel(f"ipv4:{cluster.address}") as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            answer = admin.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=5)
        except grpc.RpcError:
            return {}
    return {worker.worker_id: worker.version for worker in answer.workers}


def drain(cluster: Cluster, worker_id: str) -> None:
    """Tell a worker to leave, as an operator does."""
    with grpc.insecure_channel(f"ipv4:{cluster.address}") as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        admin.DrainWorkers(admin_pb2.DrainWorkersRequest(worker_ids=[worker_id]), timeout=10)


def released(folder: Path) -> Path | None:
    """Unpack the sources of the released commit; None: this clone has no such commit."""
    done = subprocess.run(
        ["git", "archive", RELEASED], cwd=TESTS.parent, capture_output=True, timeout=60
    )
    if done.returncode != 0:
        return None
    folder.mkdir(parents=True)
    # Not by `tarfile`: Python 3.11.2 has no filters there, and later versions ask for one.
    subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True, timeout=60)
    return folder


def replace_all(
    cluster: Cluster,
    version: str,
    clients: Clients | None = None,
    tree: Path | None = None,
    first: int | None = None,
) -> None:
    """Replace every scheduler, then every worker; the first worker by an operator's word.

    By these sources, or by those of a tree. Only the `first` of each, if it is given.
    """

    def go_on() -> None:
        if clients is not None:
            clients.wait_for_progress()

    for scheduler in cluster.schedulers[:first]:
        assert scheduler.stop() == 0, scheduler.last_words()
        go_on()
        scheduler.again(tree=tree)
        wait_until(cluster.serves, "all schedulers serve", _END)
        go_on()
    for index, worker in enumerate(cluster.workers[:first]):
        if index == 0 and clients is not None:
            drain(cluster, f"{worker.name}.{worker.pid}")
            worker.finish(_END)
        else:
            assert worker.stop() == 0, worker.last_words()
        go_on()
        worker.again(_worker_command(cluster, worker, version, tree), tree)
        wait_until(
            lambda worker=worker: versions(cluster).get(f"{worker.name}.{worker.pid}") == version,
            f"the new {worker.name} is there",
            _END,
        )
    assert first is not None or set(versions(cluster).values()) == {version}


def _worker_command(
    cluster: Cluster, worker: Part, version: str, tree: Path | None
) -> Sequence[str]:
    """Return the command of a stand-in worker, whose options are those of its own commit."""
    if tree is None:
        return [*worker.command, "--version", version]
    start = worker.command.index("chaos.worker") + 1
    return [
        *worker.command[:start],
        *("--scheduler", cluster.address, "--name", worker.name, "--version", version),
    ]


def run(
    cluster: Cluster,
    rounds: Sequence[Path | None],
    seed: int,
    client_trees: Sequence[Path | None] = (),
    kills: int = 0,
) -> Report:
    """Upgrade a running cluster so often, each time to these sources or to those of a tree.

    Then kill its parts so often.
    """
    began = time.monotonic()
    clients = Clients(cluster, seed, trees=client_trees)
    clients.wait_for_progress()
    parts = {
        "worker": cluster.workers, "scheduler": cluster.schedulers, "redis": [cluster.redis],
    }  # fmt: skip
    weights = {"worker": 0.5, "scheduler": 0.35, "redis": 0.15}
    killer = Killer(lambda: parts, weights, clients.progress, seed)
    with clients.gaps() as gaps:
        for number, tree in enumerate(rounds, 1):
            replace_all(cluster, str(number), clients, tree)
        killer.run(kills)
    tally = clients.finish()
    return Report(
        seconds=round(time.monotonic() - began, 1),
        replaced={
            "schedulers": len(rounds) * len(cluster.schedulers),
            "workers": len(rounds) * len(cluster.workers),
        },
        kills=dict(killer.kills),
        jobs=tally.accepted,
        delivered=tally.delivered,
        lost=tally.lost,
        duplicates=tally.duplicates,
        differing=tally.differing,
        failed=tally.failed,
        attempts=dict(sorted(tally.attempts.items())),
        leases_lost=sum(part.log.read_text().count("leases.lost") for part in cluster.schedulers),
        longest_gap_between_results=round(gaps[-1], 2),
        faults=tally.faults,
    )


def mixed(cluster: Cluster, old: Path, seed: int, *, back: bool = False, kills: int = 0) -> Report:
    """Have an older commit's processes beside these: upgraded, or put back and upgraded again.

    Or, with `kills`, the first scheduler and the first worker older for as long. Clients are of
    both: those with the SDK older than the schedulers, or newer.
    """
    if kills:
        replace_all(cluster, "old", tree=old, first=1)
        return run(cluster, [], seed, [None, old, old], kills)
    if back:
        return run(cluster, [old, None], seed, [old, None, None])
    with cluster.store() as store:
        # As if these sources had never been here.
        for scheduler in cluster.schedulers:
            assert scheduler.stop() == 0
        store.flushall()
        for scheduler in cluster.schedulers:
            scheduler.again(tree=old)
    wait_until(cluster.serves, "all schedulers serve", _END)
    replace_all(cluster, "0", tree=old)
    return run(cluster, [None], seed, [None, old, old])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hosts", action="store_true", help="in network namespaces; as root")
    parser.add_argument("--released", action="store_true", help=f"beside those of {RELEASED}")
    parser.add_argument("--back", action="store_true", help="put it back, and upgrade it again")
    parser.add_argument("--kills", type=int, default=0, help="beside half of the released ones")
    parser.add_argument("--folder", type=Path, help="keeps logs and journals")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        old = None
        if given.released and (old := released(folder / "released")) is None:
            sys.exit(f"this clone has no commit {RELEASED}")
        network = stack.enter_context(Network(hosts_of(2, 3))) if given.hosts else None
        options: dict[str, Any] = {"lease": 30.0}
        if given.kills:
            # As in `run.py`.
            options = {"lease": 1.0, "max_lost_leases": 1000}
        cluster = stack.enter_context(Cluster(folder, workers=3, network=network, **options))
        if old is not None:
            report = mixed(cluster, old, given.seed, back=given.back, kills=given.kills)
        else:
            report = run(cluster, [None] * given.rounds, given.seed)
    print(json.dumps(asdict(report), indent=2))
    sys.exit(bool(report.faults or (report.leases_lost and not given.kills)))


if __name__ == "__main__":
    main()
