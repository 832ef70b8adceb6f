"""Real Redis servers of which one takes the place of another: a primary, replicas, Sentinels."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import redis
from redis_cluster import answers, free_ports
from reltrace_scheduler.local.binary import find_server
from waiting import wait_until

SERVICE = "mymaster"
"""The name under which Sentinels know the primary."""


@dataclass
class RedisNode:
    """A server of a test's own."""

    port: int
    folder: Path
    options: tuple[str, ...]
    admin: redis.Redis
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        command = [
            str(find_server()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
            "--dir", str(self.folder), "--appendonly", "yes", "--maxmemory-policy", "noeviction",
            "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0", *self.options,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    @property
    def file(self) -> Path:
        """The append-only file that is written: of Redis 7 and later, or before."""
        files = [*self.folder.glob("appendonlydir/*.incr.aof"), self.folder / "appendonly.aof"]
        return files[0]

    def mend_file(self) -> None:
        """Do what is needed before the start after a crash that cut the file."""
        assert mend_append_only_file(self.folder) == 1

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def follow(self, primary: "RedisNode | None") -> None:
        """Make it a replica that has all of a primary's data; None: make it a primary."""
        if primary is None:
            self.admin.replicaof("NO", "ONE")
            return
        self.admin.replicaof("127.0.0.1", primary.port)
        wait_until(lambda: self._has_all(primary), "the replica has all data", 20)

    def _has_all(self, primary: "RedisNode") -> bool:
        own, its = self.admin.info("replication"), primary.admin.info("replication")
        up = own.get("master_link_status") == "up"
        return up and own["slave_repl_offset"] == its["master_repl_offset"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it do nothing, and learn nothing of its primary's writes."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)


def mend_append_only_file(folder: Path) -> int:
    """Have Redis' own tool cut off what a crash left half written; return how many files it had."""
    # Of Redis 7 and later; before.
    names = ("appendonlydir/appendonly.aof.manifest", "appendonly.aof")
    files = [folder / name for name in names if (folder / name).exists()]
    for file in files:
        # The server is this tool too, under another name.
        subprocess.run(
            ["redis-check-aof", "--fix", str(file)], executable=find_server(), input=b"y\n",
            stdout=subprocess.DEVNULL, timeout=60, check=True,
        )  # fmt: skip
    return len(files)


@contextmanager
def redis_nodes(folder: Path, count: int, *options: str) -> Iterator[list[RedisNode]]:
    """Run servers with an append-only file each until the block ends."""
    with ExitStack() as stack:
        nodes = []
        for port in free_ports(count):
            own = folder / str(port)
            own.mkdir()
            admin = stack.enter_context(redis.Redis(port=port))
            node = RedisNode(port, own, options, admin)
            node.start()
            stack.callback(node.kill)
            nodes.append(node)
        for node in nodes:
            wait_until(lambda node=node: answers(node.admin), "a server answers", 20)
        yield nodes


@contextmanager
def sentinels(folder: Path, primary: RedisNode, count: int, quorum: int) -> Iterator[list[int]]:
    """Run Sentinels that watch a primary until the block ends; gives their ports."""
    with ExitStack() as stack:
        ports = free_ports(count)
        for port in ports:
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {quorum}\n"
                f"sentinel down-after-milliseconds {SERVICE} 1000\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
            )
            command = [str(find_server()), str(config), "--sentinel"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
        admins = [stack.enter_context(redis.Redis(port=port)) for port in ports]
        for admin in admins:
            wait_until(lambda admin=admin: _knows(admin, count), "the Sentinels are one", 30)
        yield ports


def _knows(admin: redis.Redis, count: int) -> bool:
    try:
        state = admin.sentinel_master(SERVICE)
    except redis.RedisError:
        return False
    # It learns of replicas from the primary, ten seconds later at the latest.
    return state["num-other-sentinels"] == count - 1 and state["num-slaves"] > 0


@dataclass
class Service:
    """An address that leads to one server, then to another, like a name or a service's address.

    Connections that are open stay with the server that they were made to.
    """

    target: int
    port: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator["Service"]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            yield self
        for each in self._sockets:
            each.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                inside, _ = listener.accept()
            except OSError:
                return
            try:
                outside = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                inside.close()
                continue
            self._sockets += [inside, outside]
            for pair in ((inside, outside), (outside, inside)):
                threading.Thread(target=_carry, args=pair, daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
