"""One Redis of the service: a primary, or the replica of one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from chaos.part import Part
from redis_failover import mend_append_only_file
from reltrace_scheduler.local.binary import find_server

Start = Callable[[str, Sequence[str], Callable[[], None]], Part]
"""Starts a process: its name, its command, and what is called before every start."""


class RedisNode:
    """A Redis with an append-only file, and what an operator does with it.

    Parameters
    ----------
    name
        Of the process.
    folder
        In which its data have a folder.
    fsync
        Redis's `appendfsync`.
    host, port
        Where it listens besides its socket; port 0: nowhere.
    options
        Further ones of the command line.
    """

    def __init__(
        self, name: str, folder: Path, fsync: str, host: str, port: int, options: Sequence[str]
    ) -> None:
        self.name = name
        self.address = (host, port)
        self._fsync = fsync
        self._options = options
        self._data = folder / name
        self._data.mkdir(exist_ok=True)
        self._stack = ExitStack()
        # A socket's path has to be short.
        sockets = Path(tempfile.mkdtemp(prefix="reltrace-chaos-"))
        self._stack.callback(shutil.rmtree, sockets)
        self.socket = sockets / "redis.sock"
        self.follow(None)

    def start(self, start: Start) -> None:
        """Run it as a part of the cluster."""
        self.part = start(self.name, self._command(), self._mend)

    def close(self) -> None:
        self._stack.close()

    def follow(self, primary: RedisNode | None) -> None:
        """Make it, from its next start on, the replica of another, or a primary."""
        role = "" if primary is None else "replicaof {} {}\n".format(*primary.address)
        self._role.write_text(role)

    @contextmanager
    def store(self, seconds: float = 10.0) -> Iterator[redis.Redis]:
        """Connect to it, to look into it; each answer may take so long."""
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=seconds) as client:
            yield client

    @property
    def _role(self) -> Path:
        return self._data / "role.conf"

    def _command(self) -> list[str]:
        host, port = self.address
        listen = ["--bind", host, "--protected-mode", "no"] if port else []
        return [
            *(str(find_server()), str(self._role), "--port", str(port), *listen),
            # Beside the port: for who looks into it, past the network.
            *("--unixsocket", str(self.socket), "--dir", str(self._data)),
            *("--appendonly", "yes", "--appendfsync", self._fsync, "--save", ""),
            *("--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0"),
            *self._options,
        ]

    def _mend(self) -> None:
        """Do what an operator has to do before Redis starts after a crash.

        A SIGKILL in the middle of a write leaves half a transaction at the end of the file. Redis
        cuts off its last command only, and what is written next is read as a part of it at the
        start after (https://github.com/valkey-io/valkey/pull/4342). `EmbeddedRedis` sees to that
        by itself.
        """
        mend_append_only_file(self._data)
