"""A real Redis Cluster of several nodes on this machine."""

import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from reltrace_scheduler.local.binary import find_server
from waiting import wait_until

SLOTS = 16384


@dataclass(frozen=True)
class ClusterNode:
    """One node of the cluster."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"


@contextmanager
def redis_cluster(
    nodes: int, appendfsync: str = "everysec", replicas: int = 0
) -> Iterator[list[ClusterNode]]:
    """Run primaries with an equal part of the slots each, until the block ends.

    Parameters
    ----------
    nodes
        How many.
    appendfsync
        Of their append-only files.
    replicas
        How many of them, from the first on, have a replica: further nodes, in the same order.
    """
    ports = free_ports(nodes + replicas)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = []
        for port in ports:
            own = Path(folder) / str(port)
            own.mkdir()
            command = [
                str(find_server()), "--port", str(port), "--cluster-enabled", "yes",
                "--bind", "127.0.0.1", "--save", "", "--dir", str(own),
                "--maxmemory-policy", "noeviction",
                "--appendonly", "yes", "--appendfsync", appendfsync,
                "--cluster-node-timeout", "2000", "--repl-diskless-sync-delay", "0",
            ]  # fmt: skip
            node = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(node.wait)
            stack.callback(node.kill)
            running.append(ClusterNode(port, node.pid))
        _join(ports, nodes)
        yield running


def _join(ports: Sequence[int], primaries: int) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(redis.Redis(port=port)) for port in ports]
        for client in clients:
            wait_until(lambda client=client: answers(client), "a node answers", 20)
        for number, client in enumerate(clients):
            if number < primaries:
                slots = range(SLOTS * number // primaries, SLOTS * (number + 1) // primaries)
                client.execute_command("CLUSTER ADDSLOTS", *slots)
            client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        for client in clients:
            wait_until(
                lambda client=client: _knows(client, len(ports)), "the nodes are one cluster", 30
            )
        for primary, replica in zip(clients, clients[primaries:], strict=False):
            replica.execute_command("CLUSTER REPLICATE", primary.execute_command("CLUSTER MYID"))
            wait_until(
                lambda replica=replica: (
                    replica.info("replication")["role"] == "slave"
                    and replica.info("replication")["master_link_status"] == "up"
                ),
                "a replica has its primary's data",
                30,
            )


def _knows(client: redis.Redis, nodes: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on; a node's bus has the port 10,000 above."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if port < 55_000:
                found.append(port)
        return found
