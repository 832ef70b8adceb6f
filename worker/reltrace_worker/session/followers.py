"""The further processes of a worker that computes models by tensor parallelism.

The process that was started is rank 0: it alone talks to a scheduler. It starts the others with its
own command line, sends them commands as lines of JSON over their standard input, and reads from
their standard output that each is done. They end with it, and it ends when one of them does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import structlog
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from reltrace_worker.engine.parallel import Command, Follower
from reltrace_worker.models.sharding import WAIT, Ranks
from reltrace_worker.types.errors import DeviceLostError

log = structlog.get_logger()

RANK = "RELTRACE_WORKER_RANK"
"""Environment of a follower: its rank, and the folder where all ranks meet."""

_STEP_SECONDS = 60.0
"""How long after another a rank may be done with a pass, whose operations all ranks do together."""

_GO_ON = {"go on": True}


def join(rank: int, size: int, folder: Path, device: str) -> Ranks:
    """Meet the other ranks of this worker in a folder."""
    # They are on one machine: whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus and rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=WAIT,
    )
    return Ranks(rank, size, PrefixStore("models", store))


def give_up(reason: str) -> None:
    """End this process: another rank has ended before jobs were taken."""
    log.critical("rank.lost", reason=reason)
    sys.stderr.flush()
    os._exit(1)


class Followers:
    """Ranks 1 and up, as rank 0 sees them.

    `command` starts one; `folder` is where they meet. `on_lost`, which may be replaced later, is
    called with a sentence when one has ended.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        command: Sequence[str],
        on_lost: Callable[[str], None] = give_up,
    ) -> None:
        self.on_lost = on_lost
        # None: it has ended.
        self._answers: list[queue.SimpleQueue[bool | None]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, size):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {RANK: f"{rank} {folder}"},
            )
            self._processes.append(process)
            self._answers.append(queue.SimpleQueue())
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def close(self) -> None:
        """Let them end, and wait for it."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            process.wait(_STEP_SECONDS)

    def of_model(self, index: int) -> ModelCommands:
        """Return the way to the followers' parts of one model."""
        return ModelCommands(self, index)

    def send(self, command: Command) -> None:
        for rank in range(1, len(self._processes) + 1):
            self._send(rank, command)

    def wait(self) -> None:
        """Wait until all have done the last command."""
        for rank, answers in enumerate(self._answers, 1):
            try:
                done = answers.get(timeout=_STEP_SECONDS)
            except queue.Empty:
                raise DeviceLostError(f"rank {rank} is not where this one is") from None
            if done is None:
                raise DeviceLostError(f"rank {rank} has ended")
            if not done:
                self._send(rank, _GO_ON)

    def _send(self, rank: int, command: Command) -> None:
        process = self._processes[rank - 1]
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            raise DeviceLostError(f"rank {rank} has ended") from error

    def _listen(self, rank: int) -> None:
        process = self._processes[rank - 1]
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                self._answers[rank - 1].put(json.loads(line))
        self._answers[rank - 1].put(None)
        self.on_lost(f"rank {rank} has ended with code {process.wait()}")


@dataclass(frozen=True, slots=True)
class ModelCommands:
    """See `reltrace_worker.engine.parallel.Commands`."""

    followers: Followers
    model: int

    def send(self, command: Command) -> None:
        self.followers.send(command)

    @contextmanager
    def under_way(self, command: Command) -> Iterator[None]:
        self.followers.send({**command, "model": self.model})
        try:
            yield
        finally:
            self.followers.wait()


class Leader:
    """Rank 0, as a follower sees it; the process ends when rank 0 has."""

    def __init__(self) -> None:
        # A terminal and some supervisors signal all processes: rank 0 decides when to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # What else is printed goes to the log.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._commands: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(sys.stdin.buffer,), daemon=True).start()

    def receive(self, timeout: float | None = None) -> Mapping[str, Any]:
        """Wait for a command, or for what the one under way waits for."""
        return self._commands.get(timeout=timeout)

    def follow(self, engines: Sequence[Follower]) -> None:
        """Run the commands of rank 0, for ever."""
        while True:
            command = dict(self.receive())
            try:
                engines[command.pop("model")].do(command)
            except Exception as error:
                log.warning("rank.failed", exc_info=error)
                self._answer(done=False)
                # Rank 0 has failed in the same way, or waits for us in the middle of its pass.
                while self.receive(_STEP_SECONDS) != _GO_ON:
                    pass
            else:
                self._answer(done=True)

    def _answer(self, *, done: bool) -> None:
        self._answers.write(json.dumps(done) + "\n")
        self._answers.flush()

    def _listen(self, commands: BinaryIO) -> None:
        for line in commands:
            self._commands.put(json.loads(line))
        os._exit(0)
