"""Replaces schedulers and workers one by one while clients keep submitting; prints a JSON object.

python tests/chaos/upgrade.py                   # every part five times
python tests/chaos/upgrade.py --rounds 1 --hosts   # on hosts of network namespaces, as root
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpc
from chaos.clients import Clients
from chaos.cluster import Cluster
from chaos.hosts import Network
from reltrace_proto.v1 import admin_pb2, admin_pb2_grpc
from waiting import wait_until

_END = 60.0
"""Seconds for a part to end in order, and for its successor to be there."""


@dataclass
class Report:
    """Figures of one run; `faults` says in words what went wrong."""

    seconds: float
    replaced: dict[str, int]
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


def replace_all(cluster: Cluster, clients: Clients, version: str) -> None:
    """Replace every scheduler, then every worker; the first worker by an operator's word."""
    for scheduler in cluster.schedulers:
        with scheduler.down():
            clients.wait_for_progress()
        wait_until(cluster.serves, "all schedulers serve", _END)
        clients.wait_for_progress()
    for index, worker in enumerate(cluster.workers):
        if index == 0:
            drain(cluster, f"{worker.name}.{worker.pid}")
            worker.finish(_END)
        else:
            assert worker.stop() == 0
        clients.wait_for_progress()
        worker.again("--version", version)
        wait_until(
            lambda worker=worker: versions(cluster).get(f"{worker.name}.{worker.pid}") == version,
            f"the new {worker.name} is there",
            _END,
        )
    assert set(versions(cluster).values()) == {version}


def run(cluster: Cluster, rounds: int, seed: int) -> Report:
    """Upgrade a running cluster so often."""
    began = time.monotonic()
    clients = Clients(cluster, seed)
    clients.wait_for_progress()
    with clients.gaps() as gaps:
        for number in range(1, rounds + 1):
            replace_all(cluster, clients, str(number))
    tally = clients.finish()
    return Report(
        seconds=round(time.monotonic() - began, 1),
        replaced={
            "schedulers": rounds * len(cluster.schedulers),
            "workers": rounds * len(cluster.workers),
        },
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hosts", action="store_true", help="in network namespaces; as root")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = stack.enter_context(Network(hosts_of(2, 3))) if given.hosts else None
        cluster = stack.enter_context(Cluster(folder, workers=3, lease=30.0, network=network))
        report = run(cluster, given.rounds, given.seed)
    print(json.dumps(asdict(report), indent=2))
    sys.exit(bool(report.faults or report.leases_lost))


if __name__ == "__main__":
    main()
