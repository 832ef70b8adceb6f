"""Reading along with a text: how soon the first token comes, and what it costs.

The same texts are written with `generate` and read along with by `generate_stream`, in turns, on
the same service: client, scheduler, Redis (append-only file) and a worker with a random model,
tokens of which take about 1 and about 10 ms. Prints one JSON object.

    python tests/bench/stream.py
    python tests/bench/stream.py --tokens 60 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import redis
import reltrace
from bench.idle_service import process
from bench.tensors import cpu_seconds
from reference.checkpoints import Recipe, save_checkpoint
from waiting import wait_until

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"
MODELS = {
    "fast": Recipe(seed=4, layers=3, context_length=2048),
    "slow": Recipe(seed=11, layers=32, context_length=2048),
}


@dataclass(frozen=True)
class Round:
    """One text: seconds, commands of Redis, and processor time of everybody."""

    seconds: float
    first: float
    pieces: int
    tokens: int
    commands: int
    cpu: dict[str, float]


def measured(
    store: redis.Redis, processes: Mapping[str, int], write: Callable[[], tuple[float, int, int]]
) -> Round:
    def state() -> tuple[int, dict[str, float]]:
        commands = int(store.info("stats")["total_commands_processed"])
        return commands, {name: cpu_seconds(pid) for name, pid in processes.items()}

    (commands, before), started = state(), time.perf_counter()
    first, pieces, tokens = write()
    seconds = time.perf_counter() - started
    commands_after, after = state()
    spent = {name: after[name] - before[name] for name in processes}
    return Round(seconds, first - started, pieces, tokens, commands_after - commands, spent)


def along(client: reltrace.Client, tokens: int) -> tuple[float, int, int]:
    stream = client.generate_stream(PROMPT, max_new_tokens=tokens)
    next(stream)
    first = time.perf_counter()
    pieces = 1 + sum(1 for _ in stream)
    assert stream.result is not None
    return first, pieces, len(stream.result.token_ids)


def whole(client: reltrace.Client, tokens: int) -> tuple[float, int, int]:
    found = client.generate(PROMPT, max_new_tokens=tokens)
    return time.perf_counter(), 1, len(found.token_ids)


def figures(folder: Path, recipe: Recipe, tokens: int, rounds: int) -> dict[str, Any]:
    model = str(save_checkpoint(folder / "model", recipe))
    data, python = str(folder / "data"), (sys.executable, "-m")
    listening = (*python, "reltrace_scheduler", "--data", data, "--listen", "127.0.0.1:0")
    with process(listening, stdout=-1, stderr=-3) as scheduler:
        assert scheduler.stdout is not None
        address = scheduler.stdout.readline().split()[-1]
        serving = (*python, "reltrace_worker", "--scheduler", address, "--model", model)
        (socket,) = Path(data).rglob("redis.sock")
        with (
            process((*serving, "--threads", "1"), stdout=-3, stderr=-3) as worker,
            redis.Redis(unix_socket_path=str(socket)) as store,
            reltrace.Client(address, retry_timeout=100) as client,
        ):
            wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
            whole(client, tokens), along(client, tokens)
            pids = {
                "client": os.getpid(),
                "scheduler": scheduler.pid,
                "worker": worker.pid,
                "redis": int(store.info("server")["process_id"]),
            }
            pairs = [
                (
                    measured(store, pids, lambda: whole(client, tokens)),
                    measured(store, pids, lambda: along(client, tokens)),
                )
                for _ in range(rounds)
            ]
    median = statistics.median
    assert {one.tokens for pair in pairs for one in pair} == {pairs[0][0].tokens}
    written = pairs[0][0].tokens
    return {
        "tokens": written,
        "rounds": rounds,
        "milliseconds_per_token": 1e3 * median(p.seconds for p, _ in pairs) / written,
        "first_token_milliseconds": 1e3 * median(a.first for _, a in pairs),
        "whole_text_milliseconds": 1e3 * median(p.seconds for p, _ in pairs),
        "time_against_generate": median(a.seconds / p.seconds for p, a in pairs),
        "pieces": median(a.pieces for _, a in pairs),
        "redis_commands_per_piece": median((a.commands - p.commands) / a.pieces for p, a in pairs),
        # The clock of processes ticks 100 times a second: sums over all rounds.
        "further_microseconds_per_piece": {
            name: 1e6
            * sum(a.cpu[name] - p.cpu[name] for p, a in pairs)
            / sum(a.pieces for _, a in pairs)
            for name in pids
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=MODELS, action="append")
    arguments = parser.parse_args()
    report = {}
    for name in arguments.only or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            report[name] = figures(Path(folder), MODELS[name], arguments.tokens, arguments.rounds)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
