"""Models that several real processes compute together, and the same models in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from reltrace_worker.engine import Engine
from reltrace_worker.engine.engine import Checkpointing
from reltrace_worker.engine.parallel import LeadingEngine
from reltrace_worker.lrp import RULES, verify_rule
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.session.followers import Followers, join


@dataclass(frozen=True)
class Pair:
    """One model, here as rank 0 of several, and alone."""

    divided: LoadedModel
    alone: LoadedModel
    followers: Followers
    index: int

    def engines(self, checkpointing: Checkpointing = "auto") -> tuple[LeadingEngine, Engine]:
        commands = self.followers.of_model(self.index)
        leading = LeadingEngine(self.divided, checkpointing, commands=commands)
        return leading, Engine(self.alone, checkpointing)


@contextmanager
def divided(size: int, models: Sequence[Path], folder: Path) -> Iterator[list[Pair]]:
    """Divide models among `size` processes, of which this is one and the others are workers."""
    command = [sys.executable, "-m", "reltrace_worker", "--scheduler", "127.0.0.1:1"]
    command += ["--tensor-parallel", str(size), "--threads", "1"]
    command += ["--device", "cpu", "--dtype", "float32", "--log-level", "warning"]
    for model in models:
        command += ["--model", str(model)]
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    lost: list[str] = []
    followers = Followers(size, folder, command, lost.append)
    try:
        ranks = join(0, size, folder, "cpu")
        pairs = []
        for index, model in enumerate(models):
            part, alone = (
                load_model(str(model), dtype="float32", device="cpu", ranks=which)
                for which in (ranks, None)
            )
            # As the others do while they load.
            for rule in RULES.values():
                verify_rule(part.model, rule)
            pairs.append(Pair(part, alone, followers, index))
        yield pairs
        assert not lost
    finally:
        followers.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
