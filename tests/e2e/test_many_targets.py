"""A job with many targets beside others, through real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reltrace
from e2e.conftest import Process, wait_until

PROMPT = "I have 5 cats and 3 dogs. My cats love to play with my"
MAX_TOKENS = 64


def passes(worker: Process) -> list[tuple[int, int]]:
    """Return the jobs and the tokens of each pass so far."""
    whole = worker.errors.read_text().rpartition("\n")[0]
    said = [json.loads(line) for line in whole.splitlines()]
    return [(line["jobs"], line["tokens"]) for line in said if line["event"] == "pass.done"]


def test_many_targets_cost_their_neighbours_nothing(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """
    Given a worker with passes of 64 tokens
    If 40 prompts are traced beside one that has 32 targets
    I expect the passes to hold each prompt once, and that one 32 times, in 64 tokens each; the
    numbers of 32 jobs; and a fault of a target to be the caller's, with its name, in one pass.
    If another prompt comes while one of 600 targets is traced
    I expect its result long before that one's.
    """
    scheduler = start(
        "reltrace_scheduler", "--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"
    )
    address = scheduler.first_line().split()[-1]
    worker = start(
        "reltrace_worker", "--scheduler", address, "--model", "demo", "--threads", "1",
        "--max-tokens", str(MAX_TOKENS), "--log-level", "debug", "--log-format", "json",
    )  # fmt: skip
    with reltrace.Client(address, retry_timeout=100) as client:
        wait_until(lambda: len(client.models()) == 1, "the model is served", 100)
        alone = [client.trace(PROMPT, target=token, timeout=60) for token in range(32)]
        short = client.trace("I have 5", timeout=60)
        before = len(passes(worker))
        assert before == 33

        items = [*["I have 5"] * 20, {"prompt": PROMPT, "target": list(range(32))}]
        items += ["I have 5"] * 20
        *others, many = sorted(
            client.trace_many(items, timeout=100), key=lambda trace: isinstance(trace, list)
        )
        assert isinstance(many, list)
        for ours, wanted in zip(many, alone, strict=True):
            assert ours.target.token_id == wanted.target.token_id
            most = float(np.abs(wanted.relevance).max())
            assert float(np.abs(ours.relevance - wanted.relevance).max()) <= 1e-5 * most
        assert len(others) == 40
        length = len(alone[0].tokens)
        ran = passes(worker)[before:]
        assert sum(tokens for _, tokens in ran) == 40 * len(short.tokens) + 32 * length
        assert max(tokens for _, tokens in ran) <= MAX_TOKENS

        before = len(passes(worker))
        faulty = [" dogs", reltrace.Target(contrast=short.target.token_id)]
        with pytest.raises(reltrace.InvalidArgument, match=r"target\[1\]\.contrast"):
            client.trace("I have 5", target=faulty, timeout=60)
        assert passes(worker)[before:] == [(1, 2 * len(short.tokens))]

        before = len(passes(worker))
        with ThreadPoolExecutor(1) as thread:
            large = thread.submit(client.trace, PROMPT, target=[7] * 600, timeout=200)
            wait_until(lambda: len(passes(worker)) > before, "the large job has begun", 100)
            client.trace("I have 5", timeout=60)
            assert not large.done()
            assert len(large.result()) == 600
    assert worker.stop() == 0
