"""Runs another task queue: its Redis, its worker, and the process that submits and reads.

The others have requirements of their own (arq wants an older redis-py), so they live in an
interpreter of their own. Each is used as its documentation says, with results in Redis, and so
that a task is acknowledged after its work and delivered again when its worker dies.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from bench.idle_service import process, redis_server

HERE = Path(__file__).parent
LIBRARIES = ("dramatiq", "arq", "taskiq")


class Rival:
    """One library, as a context manager.

    Parameters
    ----------
    name : str
        One of `LIBRARIES`.
    python : str
        Interpreter that has it.
    appendfsync : str
        As in Redis' configuration.
    """

    def __init__(self, name: str, python: str, appendfsync: str) -> None:
        self.name = name
        self.version = ""
        self._python = python
        self._appendfsync = appendfsync
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        url, _ = self._stack.enter_context(redis_server(self._appendfsync))
        environment = os.environ | {"BENCH_REDIS": url}
        module = f"{self.name}_side"
        folder = Path(self._python).parent
        worker = {
            "dramatiq": [
                str(folder / "dramatiq"), module, "--processes", "1", "--threads", "8",
            ],
            "arq": [str(folder / "arq"), f"{module}.WorkerSettings"],
            "taskiq": [
                str(folder / "taskiq"), "worker", f"{module}:broker", "--workers", "1",
                "--ack-type", "when_saved",
            ],
        }[self.name]  # fmt: skip
        options: dict[str, Any] = {"cwd": HERE, "env": environment}
        self._stack.enter_context(
            process(worker, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        )
        self._submitter = self._stack.enter_context(
            process(
                [self._python, str(HERE / f"{module}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                **options,
            )
        )
        self.version = self._answer()["version"]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, jobs: int) -> dict[str, float]:
        """Bring jobs to their results; return the seconds, in all and for submitting."""
        assert self._submitter.stdin is not None
        self._submitter.stdin.write(f"{jobs}\n")
        self._submitter.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._submitter.stdout is not None
        line = self._submitter.stdout.readline()
        assert line, f"the submitter of {self.name} ended"
        answer: dict[str, Any] = json.loads(line)
        return answer
