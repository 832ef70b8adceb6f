"""Child processes that are kept running, with their output in bounded log files."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from reltrace.types.errors import TraceError

_LOG_BYTES = 4 * 1024 * 1024
_TAIL_BYTES = 4096
_TAIL_LINES = 12

# Before the service has been up: this many deaths, and it is not coming up.
_EARLY_DEATHS = 3
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 30.0
# A part that lived this long is started again as if for the first time.
_LONG_LIFE = 60.0


class PartFailed(TraceError):  # noqa: N818 - like its siblings
    """A part does not come up; the message holds its last words."""


class LogFile:
    """A log of at most 8 MiB: two files, the older one with the ending ".1".

    Parameters
    ----------
    path : Path
        The newer file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._tail = b""

    def write(self, data: bytes) -> None:
        """Append, and move on to a new file when this one is full."""
        if self._size + len(data) > _LOG_BYTES and self._size:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("ab", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def forget(self) -> None:
        """Begin the tail anew."""
        self._tail = b""

    def tail(self) -> list[str]:
        """Return the last lines that were written."""
        return self._tail.decode(errors="replace").splitlines()[-_TAIL_LINES:]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Part:
    """One child process, started again whenever it ends.

    Parameters
    ----------
    name : str
        For messages, and of the log file.
    command : sequence of str
        Program (an absolute path) and arguments.
    environment : mapping of str to str
        All of its environment.
    logs : Path
        Folder of the log file.
    report : callable
        Takes messages for people; raises nothing.
    own_error : str
        How the part's own one-line errors begin: before the service has been up, one of these
        ends the attempts, since trying again would end the same way.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        logs: Path,
        report: Callable[[str], None],
        own_error: str,
    ) -> None:
        self.name = name
        self.settled = False
        self._command = tuple(command)
        self._environment = environment
        self._report = report
        self._own_error = own_error
        self._log = LogFile(logs / f"{name}.log")
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._early_deaths = 0

    @property
    def pid(self) -> int | None:
        """The process, if it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    async def keep_running(self) -> None:
        """Run the part until `stop`.

        Raises
        ------
        PartFailed
            If it keeps ending before it has been `settled`.
        """
        delay = _FIRST_DELAY
        while not self._stopping:
            began = time.monotonic()
            code = await self._run_once()
            if self._stopping:
                return
            if not self.settled:
                self._count_early_death(code)
            if time.monotonic() - began > _LONG_LIFE:
                delay = _FIRST_DELAY
            self._report(f"{self.name} {_ended(code)}; starting it again (log: {self._log.path})")
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _count_early_death(self, code: int) -> None:
        self._early_deaths += 1
        tail = self._log.tail()
        final = code == 2 or bool(tail and tail[-1].startswith(self._own_error))
        if final or self._early_deaths >= _EARLY_DEATHS:
            times = "" if self._early_deaths == 1 else f" {self._early_deaths} times"
            words = "".join(f"\n  {line}" for line in tail)
            raise PartFailed(
                f"{self.name} {_ended(code)}{times} before it was ready{':' if tail else ''}{words}"
                f"\n(log: {self._log.path})"
            )

    async def _run_once(self) -> int:
        loop = asyncio.get_running_loop()
        self._log.forget()
        # A pipe of our own: asyncio's would keep `wait` waiting for grandchildren that hold it.
        reader, writer = os.pipe()
        try:
            os.set_blocking(reader, False)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *_guarded(self._command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=writer,
                    stderr=writer,
                    env=self._environment,
                    # Ctrl-C in a terminal reaches its whole process group; the order in which
                    # parts end is ours to choose.
                    start_new_session=True,
                )
            finally:
                os.close(writer)
            loop.add_reader(reader, self._pump, reader)
            if self._stopping:
                # `stop` came while the process was being made, and found none.
                self._signal(signal.SIGTERM)
            code = await self._process.wait()
            self._pump(reader)
            return code
        finally:
            loop.remove_reader(reader)
            os.close(reader)

    def _pump(self, reader: int) -> None:
        while True:
            try:
                data = os.read(reader, 65536)
            except BlockingIOError:
                return
            if not data:
                asyncio.get_running_loop().remove_reader(reader)
                return
            self._log.write(data)

    async def stop(self, grace: float) -> None:
        """End the part: SIGTERM, and SIGKILL to its whole group after `grace` seconds."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace):
                    await process.wait()
            except TimeoutError:
                self._report(f"{self.name} has not ended after {grace:g} s: killing it")
                self.kill()
                await process.wait()

    def kill(self) -> None:
        """Send SIGKILL to the part and what it has started."""
        self._stopping = True
        self._signal(signal.SIGKILL, group=True)

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(pid, number)


def _guarded(command: Sequence[str]) -> list[str]:
    """Return the command behind the program that ties it to this process's life."""
    guard = str(Path(__file__).with_name("child.py"))
    return [sys.executable, "-I", "-S", guard, str(os.getpid()), *command]


def _ended(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
