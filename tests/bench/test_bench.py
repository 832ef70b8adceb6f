"""The benchmarks run, at a size of seconds, and their two sides compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_engine_benchmark_gives_its_figures() -> None:
    command = [
        sys.executable, str(HERE / "engine.py"), "--shape", "tiny", "--prompts", "3",
        "--longest", "40", "--rounds", "1", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    example, forward, memory = report["example"], report["forward"], report["memory"]
    assert example["prompts"] == 3
    assert example["speedup"]["median"] > 0
    # The example's numbers are ours: what is timed is the same work.
    assert example["largest_difference_per_layer"] < 1e-4
    assert forward["without_checkpointing"]["median"] > 1
    assert forward["with_checkpointing"]["median"] > 1
    for peaks in memory["bytes_by_length"].values():
        assert 0 < peaks["on"] < peaks["off"]
    assert (
        memory["growth_4_to_64_layers"]["on"] <= 1.15 * memory["growth_4_to_64_layers"]["goal_on"]
    )
    assert memory["growth_4_to_64_layers"]["off"] > 10
    assert 0 < report["bfloat16"]["median"] < 0.2
    assert report["bfloat16"]["correlation"] > 0.9
    assert report["attention"] == "sdpa"


def test_the_service_benchmark_gives_its_figures() -> None:
    command = [
        sys.executable, str(HERE / "service.py"), "--shape", "tiny", "--prompts", "4",
        "--rounds", "1", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["prompts"] == 4
    assert report["speedup"]["median"] > 0
    assert report["largest_difference_per_layer"] < 1e-4
    assert report["round_trip_above_engine_ms"]["median"] > 0
