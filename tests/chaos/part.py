"""A process that can be killed, paused and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

TESTS = Path(__file__).parent.parent

_SOURCES = ("tests", "proto", "client", "scheduler", "worker")
"""Folders of a tree from which Python imports."""

_AGAIN = 0.1
"""Seconds before a process that ended is started again."""


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended without having been asked or killed."""

    part: str
    code: int
    last_words: str


class Part:
    """A process that is started again whenever it ends, unless in order.

    Parameters
    ----------
    name
        For messages, and of the log file.
    command
        Program and arguments.
    folder
        Of the log file.
    prepare
        Called before every start.
    tree
        Sources that it runs, of another commit; None: these.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        prepare: Callable[[], object] = lambda: None,
        tree: Path | None = None,
    ) -> None:
        self.name = name
        self.deaths: list[Death] = []
        self.log = folder / f"{name}.log"
        self.command = self._command = list(command)
        self._tree = tree
        self._prepare = prepare
        self._lock = threading.Lock()
        self._killed = False
        self._stopping = threading.Event()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep_running, name=f"keep {name}")
        self._keeper.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._keeper.is_alive():
            self._end(signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether it ended in order, or was ended, and is not started again."""
        return not self._keeper.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> int | None:
        """SIGKILL: no chance to clean up; it is started again at once.

        Returns
        -------
        int or None
            Process id of the one that was killed; None: it was dead already.
        """
        with self._lock:
            if self._process.poll() is not None:
                return None
            self._killed = True
            self._process.kill()
            return self._process.pid

    def stop(self, seconds: float = 30.0, number: signal.Signals = signal.SIGTERM) -> int:
        """End it, and do not start it again; return the exit code."""
        return self._end(number, seconds)

    def finish(self, seconds: float) -> int:
        """Wait until the process has ended in order by itself; return its exit code, 0."""
        self._keeper.join(seconds)
        assert not self._keeper.is_alive(), f"{self.name} goes on: {self.last_words()}"
        return self._process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP until the block ends: it is there, and does not answer."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Ended in order, and started again when the block ends."""
        code = self.stop()
        assert code == 0, f"{self.name} ended with {code}: {self.last_words()}"
        try:
            yield
        finally:
            self.again()

    def again(self, command: Sequence[str] = (), tree: Path | None = None) -> None:
        """Start it again after it has ended in order, by another command if one is given."""
        assert not self._keeper.is_alive()
        self._command = list(command or self.command)
        self._tree = tree
        self._stopping.clear()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep_running, name=f"keep {self.name}")
        self._keeper.start()

    def _end(self, number: signal.Signals, seconds: float = 10.0) -> int:
        with self._lock:
            self._stopping.set()
            self._process.send_signal(number)
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._keeper.join()
        return code

    def _start(self) -> subprocess.Popen[bytes]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("RELTRACE_")}
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        if self._tree is not None:
            paths = [str(self._tree / name) for name in _SOURCES]
        self._prepare()
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own | {"PYTHONPATH": os.pathsep.join(paths)},
            )

    def _keep_running(self) -> None:
        while True:
            code = self._process.wait()
            with self._lock:
                if self._stopping.is_set():
                    return
                if code == 0:
                    return
                if not self._killed:
                    self.deaths.append(Death(self.name, code, self.last_words()))
                self._killed = False
            if self._stopping.wait(_AGAIN):
                return
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = self._start()

    def last_words(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
