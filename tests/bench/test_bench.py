"""The benchmarks run, at a size of seconds, and their two sides compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RIVALS = HERE.parents[1] / ".venv/rivals/bin/python"


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_benchmark_of_texts_gives_its_figures() -> None:
    report = run("stream.py", "--tokens", "40", "--rounds", "1", "--only", "fast")
    assert set(report) == {"fast"}
    for figures in report.values():
        assert figures["tokens"] == 40
        assert 0 < figures["first_token_milliseconds"] < 20_000
        assert figures["time_against_generate"] > 0
        assert figures["redis_commands_per_piece"] > 0


def test_the_benchmark_of_texts_together_gives_its_figures() -> None:
    report = run(
        "texts.py", "--model", "tiny", "--texts", "3", "--prompts", "4", "9", "--tokens", "2", "6",
        "--rounds", "1",
    )  # fmt: skip
    assert (report["texts"], report["tokens"]) == (3, 12)
    assert report["speedup"] > 0
    # Both sides do the same work.
    assert report["same_texts"] == 1


def test_the_engine_benchmark_gives_its_figures() -> None:
    command = [
        sys.executable, str(HERE / "engine.py"), "--model", "tiny", "--prompts", "3",
        "--longest", "40", "--rounds", "1", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    example, forward, memory = report["lxt"], report["forward"], report["memory"]
    assert example["prompts"] == 3
    assert example["speedup"]["median"] > 0
    # The example's numbers are ours: what is timed is the same work.
    assert example["difference_per_layer"]["largest"] < 1e-4
    assert example["difference_to_padded"]["largest"] < 1e-4
    assert example["speedup_over_padded"]["median"] > 0
    assert 0 < report["products"]["share"]["median"] < 1
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
        sys.executable, str(HERE / "service.py"), "--model", "tiny", "--prompts", "4",
        "--rounds", "1", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["prompts"] == 4
    assert report["speedup"]["median"] > 0
    assert report["difference_per_layer"]["largest"] < 1e-4
    assert report["round_trip_above_engine_ms"]["median"] > 0


def test_the_benchmark_of_tiny_jobs_gives_its_figures() -> None:
    report = run("jobs.py", "--jobs", "300", "--rounds", "1", "--round-trips", "5")
    assert report["cores"] <= 2
    for side in ("sdk", "raw", "submit_only"):
        assert report[side]["jobs"] == 300
        assert report[side]["per_second"] > 0
    assert set(report["sdk"]["cpu_microseconds_per_job"]) == {
        "client", "scheduler", "worker", "redis",
    }  # fmt: skip
    assert 0 < report["round_trip_ms"]["median"] <= report["round_trip_ms"]["p99"]


@pytest.mark.parametrize("library", ["dramatiq", "arq", "taskiq"])
def test_the_benchmark_of_tiny_jobs_beside_another_queue(library: str) -> None:
    if not RIVALS.exists():
        pytest.skip("`make bench` installs what this needs")
    report = run(
        "jobs.py", "--jobs", "100", "--rounds", "1", "--round-trips", "5",
        "--rivals", str(RIVALS), "--libraries", library, "--rival-jobs", "20",
    )  # fmt: skip
    assert report[library]["jobs"] == 20
    assert report[library]["sdk_is_faster_by"] > 0


def test_the_benchmark_of_large_results_gives_its_figures() -> None:
    report = run(
        "tensors.py", "--chunk-kib", "64", "1024", "--result-mib", "2", "--results", "3",
        "--rounds", "1",
    )  # fmt: skip
    assert set(report["by_chunk_kib"]) == {"64", "1024"}
    for figures in report["by_chunk_kib"].values():
        assert figures["mb_per_second"] > 0
    assert report["slow_reader"]["mib"] == 6
    # What piles up stays in Redis: three results are no more than the client may hold.
    assert report["slow_reader"]["scheduler_growth_mib"] < 64


def test_the_benchmark_of_a_start_gives_its_figures() -> None:
    report = run("start.py", "--model", "tiny", "--rounds", "1", "--threads", "1")
    assert 0 < report["loading_seconds"] < 60
    assert 0 < report["serving_seconds"] < 60
    assert report["beyond_seconds"] < report["serving_seconds"]
