"""A whole service as processes that can be killed, paused and started again."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Self

import grpc
import redis
from chaos.channels import connect
from chaos.clock import Clock
from chaos.hosts import Network
from chaos.links import Link, Links
from chaos.part import Death, Part
from chaos.redis_node import RedisNode
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc
from reltrace_scheduler.auth import tokens
from reltrace_scheduler.auth.identity import DEFAULT_TENANT, Role
from waiting import wait_until

START = 60.0
"""Seconds for everything to come up on two busy cores."""

_PORT, _REDIS_PORT = 50051, 6379
"""Of schedulers and of Redis on hosts of their own."""

FLOOD_JOBS = 5_000
"""That a tenant may have queued or leased in a cluster for actors."""

REDIS_BYTES = 128 << 20
"""Memory of Redis in such a cluster."""

RESULT_TTL = 30.0
"""Seconds for which such a cluster keeps results that nobody reads."""

_FOR_ACTORS = ("--tenant-max-jobs", str(FLOOD_JOBS), "--result-ttl", str(RESULT_TTL))


class Cluster:
    """Redis, schedulers and workers, each of which may die at any moment.

    Parameters
    ----------
    folder
        Of logs and of Redis's append-only file.
    schedulers, workers
        How many of each.
    lease
        Seconds.
    fsync
        Redis's `appendfsync`.
    max_lost_leases
        After which a job is quarantined.
    jobs_per_pass
        Of the stand-in engine.
    network
        Hosts by the names of what runs there: ``redis``, ``scheduler0``, ``worker0``, ..., and
        ``client``; None: everything on this machine.
    for_actors
        With what the actors need, on this machine: links that can be cut, schedulers whose clocks
        can be set, tokens of two tenants, and a replica of Redis.
    """

    def __init__(
        self,
        folder: Path,
        *,
        schedulers: int = 2,
        workers: int = 2,
        lease: float = 1.0,
        fsync: str = "always",
        max_lost_leases: int = 3,
        jobs_per_pass: int = 16,
        network: Network | None = None,
        for_actors: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lease = lease
        self.fsync = fsync
        self._max_lost_leases = max_lost_leases
        self._jobs_per_pass = jobs_per_pass
        self._parts = ExitStack()
        self._network = network
        self._addresses = (
            [("127.0.0.1", port) for port in _free_ports(schedulers)]
            if network is None
            else [(network.address(f"scheduler{index}"), _PORT) for index in range(schedulers)]
        )
        self._workers = workers
        self.schedulers: list[Part] = []
        self.workers: list[Part] = []
        self.clocks: dict[str, Clock] = {}
        """By the names of the schedulers."""
        self.links: dict[str, Link] = {}
        """By the names of workers and clients: what lies between each and the schedulers."""
        self._links = self._parts.enter_context(Links()) if for_actors else None
        self._tokens: dict[str, str] = {}
        self._options: list[str] = []
        if for_actors:
            self._options = ["--tokens", str(self._make_tokens()), *_FOR_ACTORS]
        self.redis_nodes = [self._redis_node("redis", 0)]
        if for_actors:
            primary, replica = (
                self._redis_node(name, port)
                for name, port in zip(("redis", "redis1"), _free_ports(2), strict=True)
            )
            replica.follow(primary)
            self.redis_nodes = [primary, replica]
        # The name under which schedulers know Redis: it moves with the primary.
        self._name = self.redis_nodes[0].socket.with_name("primary.sock")
        self.point_to_primary()

    def __enter__(self) -> Self:
        try:
            for node in self.redis_nodes:
                node.start(lambda name, *how: self.start(name, how[0], prepare=how[1]))
                with node.store() as store:
                    wait_until(lambda store=store: _answers(store), "Redis answers", START)
            for index, (host, port) in enumerate(self._addresses):
                name = f"scheduler{index}"
                module = ["reltrace_scheduler"]
                if self._links is not None:
                    clock = self.folder / f"{name}.clock"
                    self.clocks[name] = Clock(clock)
                    module = ["chaos.clock", str(clock), *module]
                self.schedulers.append(
                    self.start_module(
                        name, *module,
                        "--listen", f"{host}:{port}", "--redis", self._redis_url(), "--insecure",
                        "--lease", str(self.lease),
                        "--max-lost-leases", str(self._max_lost_leases), *self._options,
                    )
                )  # fmt: skip
            for index in range(self._workers):
                self.add_worker(f"worker{index}")
            # One of them is enough for the workers; a test may stop the other in order.
            wait_until(self.serves, "all schedulers serve", START)
            wait_until(lambda: self.connected() == self._workers, "all workers connect", START)
        except BaseException:
            self._parts.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _redis_node(self, name: str, port: int) -> RedisNode:
        host = "127.0.0.1"
        if self._network is not None:
            host, port = self._network.address("redis"), _REDIS_PORT
        options = ["--maxmemory", str(REDIS_BYTES)] if self._links is not None else []
        node = RedisNode(name, self.folder, self.fsync, host, port, options)
        self._parts.callback(node.close)
        return node

    def point_to_primary(self) -> None:
        """Let the name under which schedulers know Redis lead to the first of `redis_nodes`."""
        new = self._name.with_name("next.sock")
        new.symlink_to(self.redis_nodes[0].socket)
        new.rename(self._name)

    def _redis_url(self) -> str:
        if self._network is None:
            return f"unix://{self._name}"
        return f"redis://{self._network.address('redis')}:{_REDIS_PORT}"

    def _make_tokens(self) -> Path:
        entries = []
        for name, role, tenant in (
            ("worker", Role.WORKER, DEFAULT_TENANT),
            (DEFAULT_TENANT, Role.CLIENT, DEFAULT_TENANT),
            ("flood", Role.CLIENT, "flood"),
        ):
            self._tokens[name], entry = tokens.make(name, role, tenant)
            entries.append(entry.to_toml())
        path = self.folder / "tokens.toml"
        path.write_text("".join(entries))
        return path

    def connection_of(self, name: str, token: str = DEFAULT_TENANT) -> list[str]:
        """Return the options by which a process connects to the schedulers, over a link its own."""
        if self._links is None:
            return ["--server", self.address]
        self.links[name] = self._links.to(self._addresses)
        return ["--server", self.links[name].address, "--token", self._tokens[token]]

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        host: str = "",
        prepare: Callable[[], object] = lambda: None,
        tree: Path | None = None,
    ) -> Part:
        """Start a process that ends with the cluster, on the host of its name or of another."""
        if self._network is not None:
            command = self._network.on(host or name, command)
        return self._parts.enter_context(Part(name, command, self.folder, prepare, tree))

    def start_module(
        self, name: str, module: str, *options: str, host: str = "", tree: Path | None = None
    ) -> Part:
        """Start ``python -m MODULE OPTIONS``."""
        return self.start(name, [sys.executable, "-m", module, *options], host=host, tree=tree)

    def hang_order(self, worker: str) -> Path:
        """Return the file that tells a worker to hang in its next pass; it takes the file away."""
        return self.folder / f"{worker}.hang"

    def add_worker(self, name: str) -> Part:
        """Start a stand-in worker."""
        part = self.start_module(
            name, "chaos.worker",
            *self.connection_of(name, "worker"), "--name", name,
            "--jobs-per-pass", str(self._jobs_per_pass), "--hang", str(self.hang_order(name)),
        )  # fmt: skip
        self.workers.append(part)
        return part

    @property
    def address(self) -> str:
        """All schedulers, as clients and workers take them."""
        return ",".join(f"{host}:{port}" for host, port in self._addresses)

    @property
    def deaths(self) -> list[Death]:
        """What ended by itself."""
        return [death for part in self.parts for death in part.deaths]

    @property
    def parts(self) -> list[Part]:
        nodes = [node.part for node in self.redis_nodes]
        return [*nodes, *self.schedulers, *self.workers]

    @property
    def redis(self) -> Part:
        """The Redis that schedulers use."""
        return self.redis_nodes[0].part

    def store(self) -> AbstractContextManager[redis.Redis]:
        """Connect to Redis, to look into it."""
        return self.redis_nodes[0].store()

    @contextmanager
    def client(self) -> Iterator[trace_pb2_grpc.TraceServiceStub]:
        """Connect to the schedulers."""
        with connect(self.address, self._tokens.get(DEFAULT_TENANT, "")) as channel:
            yield trace_pb2_grpc.TraceServiceStub(channel)

    def serves(self) -> bool:
        """Tell whether every scheduler takes connections."""
        return all(map(_listens, self._addresses))

    def connected(self) -> int:
        """Count workers that the service knows at present; 0 when it does not answer."""
        with self.client() as client:
            try:
                answer = client.ListModels(trace_pb2.ListModelsRequest(), timeout=5)
            except grpc.RpcError:
                return 0
        return sum(model.workers for model in answer.models)


def _answers(store: redis.Redis) -> bool:
    try:
        return bool(store.ping())
    except redis.ConnectionError:
        return False


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
