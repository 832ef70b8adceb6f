"""Child processes that are kept running, with their output in bounded log files."""

import asyncio
import codecs
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from reltrace_scheduler.errors import StartError
from reltrace_scheduler.local.guard import guarded

_LOG_BYTES = 4 * 1024 * 1024
_TAIL_CHARACTERS = 4096
_TAIL_LINES = 12

_MAX_EARLY_DEATHS = 3
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 5.0
"""Seconds. A process that ran for longer is started again at once."""


class Log:
    """A log of at most 8 MiB: two files, the older one with the ending ".1"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RotatingFileHandler(
            path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True
        )
        self._file.terminator = ""
        self.reset()

    def reset(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tail = ""

    def write(self, data: bytes) -> None:
        """Append what a process wrote, and move on to a new file when this one is full."""
        text = self._decoder.decode(data)
        self._file.emit(logging.makeLogRecord({"msg": text}))
        self._tail = (self._tail + text)[-_TAIL_CHARACTERS:]

    def tail(self) -> list[str]:
        return self._tail.splitlines()[-_TAIL_LINES:]

    def close(self) -> None:
        self._file.close()


class Child:
    """One of our commands as a child process, started again whenever it ends."""

    def __init__(
        self,
        name: str,
        package: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        logs: Path,
        report: Callable[[str], None],
    ) -> None:
        self.name = name
        self.was_ready = False
        # -P: a file of the folder that `up` is started in must not pass for a module.
        self._command = [sys.executable, "-P", "-m", package, *arguments]
        self._error_prefix = f"{package.replace('_', '-')}:"
        self._environment = environment
        self._report = report
        self._log = Log(logs / f"{name}.log")
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._early_deaths = 0

    async def keep_running(self) -> None:
        """Run the child until `stop`; raises StartError if it is never ready."""
        delay = 0.0
        try:
            while not self._stopping:
                began = time.monotonic()
                code = await self._run_once()
                if self._stopping:
                    return
                if not self.was_ready:
                    self._count_early_death(code)
                if time.monotonic() - began > _LONGEST_DELAY:
                    delay = 0.0
                problem = f"{self.name} {_ended(code)}"
                self._report(f"{problem}; starting it again (log: {self._log.path})")
                await asyncio.sleep(delay)
                delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)
        finally:
            self._log.close()

    def _count_early_death(self, code: int) -> None:
        self._early_deaths += 1
        tail = self._log.tail()
        # Wrong usage, or a one-line error of the command itself: it would end the same way again.
        final = code == 2 or bool(tail and tail[-1].startswith(self._error_prefix))
        if final or self._early_deaths >= _MAX_EARLY_DEATHS:
            times = "" if self._early_deaths == 1 else f" {self._early_deaths} times"
            lines = "".join(f"\n  {line}" for line in tail)
            raise StartError(
                f"{self.name} {_ended(code)}{times} before it was ready{':' if tail else ''}{lines}"
                f"\n(log: {self._log.path})"
            )

    async def _run_once(self) -> int:
        loop = asyncio.get_running_loop()
        self._log.reset()
        # A pipe of our own: asyncio's would keep `wait` waiting for grandchildren that hold it.
        reader, writer = os.pipe()
        try:
            os.set_blocking(reader, False)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *guarded(self._command, signal.SIGKILL),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=writer,
                    stderr=writer,
                    env=self._environment,
                    # Ctrl-C in a terminal reaches its whole process group; the order in which
                    # children end is ours to choose.
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
        """End the child: SIGTERM, and SIGKILL to its whole group after `grace` seconds."""
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
        self._stopping = True
        self._signal(signal.SIGKILL, group=True)

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, number)


def _ended(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
