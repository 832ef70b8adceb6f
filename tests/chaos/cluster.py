"""A whole service as processes that can be killed, paused and started again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import grpc
import redis
from chaos.hosts import Network
from chaos.part import Death, Part
from reltrace_proto.v1 import trace_pb2, trace_pb2_grpc
from reltrace_scheduler.local.redis import find_server
from waiting import wait_until

START = 60.0
"""Seconds for everything to come up on two busy cores."""

_PORT, _REDIS_PORT = 50051, 6379
"""Of schedulers and of Redis on hosts of their own."""


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
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lease = lease
        self._max_lost_leases = max_lost_leases
        self._jobs_per_pass = jobs_per_pass
        self._parts = ExitStack()
        # A socket's path has to be short.
        sockets = Path(tempfile.mkdtemp(prefix="reltrace-chaos-"))
        self._parts.callback(shutil.rmtree, sockets)
        self._socket = sockets / "redis.sock"
        self._fsync = fsync
        self._network = network
        self._addresses = (
            [("127.0.0.1", port) for port in _free_ports(schedulers)]
            if network is None
            else [(network.address(f"scheduler{index}"), _PORT) for index in range(schedulers)]
        )
        self._workers = workers
        self.schedulers: list[Part] = []
        self.workers: list[Part] = []

    def __enter__(self) -> Self:
        try:
            self.redis = self.start("redis", self._redis_command(), prepare=self._mend)
            with self.store() as store:
                wait_until(lambda: _answers(store), "Redis answers", START)
            for index, (host, port) in enumerate(self._addresses):
                self.schedulers.append(
                    self.start_module(
                        f"scheduler{index}", "reltrace_scheduler",
                        "--listen", f"{host}:{port}", "--redis", self._redis_url(), "--insecure",
                        "--lease", str(self.lease),
                        "--max-lost-leases", str(self._max_lost_leases),
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

    def _redis_url(self) -> str:
        if self._network is None:
            return f"unix://{self._socket}"
        return f"redis://{self._network.address('redis')}:{_REDIS_PORT}"

    def _redis_command(self) -> list[str]:
        data = self.folder / "redis"
        data.mkdir(exist_ok=True)
        port = ["--port", "0"]
        if self._network is not None:
            port = ["--port", str(_REDIS_PORT), "--bind", self._network.address("redis")]
            port += ["--protected-mode", "no"]
        return [
            str(find_server()),
            *port,
            # With hosts as well: for who looks into it, past the network.
            *("--unixsocket", str(self._socket), "--dir", str(data)),
            *("--appendonly", "yes", "--appendfsync", self._fsync, "--save", ""),
            *("--maxmemory-policy", "noeviction"),
        ]

    def _mend(self) -> None:
        """Do what an operator has to do before Redis starts after a crash.

        A SIGKILL in the middle of a write leaves half a transaction at the end of the file. Redis
        cuts off its last command only, and what is written next is read as a part of it at the
        start after (https://github.com/valkey-io/valkey/pull/4342). `EmbeddedRedis` sees to that
        by itself.
        """
        files = [
            # Redis 7 and later; before.
            self.folder / "redis" / "appendonlydir" / "appendonly.aof.manifest",
            self.folder / "redis" / "appendonly.aof",
        ]
        for file in filter(Path.exists, files):
            # The server is this tool too, under another name.
            subprocess.run(
                ["redis-check-aof", "--fix", str(file)],
                executable=find_server(),
                input=b"y\n",
                stdout=subprocess.DEVNULL,
                timeout=60,
                check=True,
            )

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

    def add_worker(self, name: str) -> Part:
        """Start a stand-in worker."""
        part = self.start_module(
            name, "chaos.worker",
            "--scheduler", self.address, "--name", name,
            "--jobs-per-pass", str(self._jobs_per_pass),
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
        return [self.redis, *self.schedulers, *self.workers]

    @contextmanager
    def store(self) -> Iterator[redis.Redis]:
        """Connect to Redis, to look into it."""
        with redis.Redis(unix_socket_path=str(self._socket), socket_timeout=10) as client:
            yield client

    @contextmanager
    def client(self) -> Iterator[trace_pb2_grpc.TraceServiceStub]:
        """Connect to the schedulers."""
        with grpc.insecure_channel(f"ipv4:{self.address}") as channel:
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
