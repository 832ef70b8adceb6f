"""A batch of many short prompts, undisturbed and killed at random; prints one JSON object.

The service is `reltrace up` with the demo model. One run is left alone; the other is killed with
SIGKILL some times at random moments and started again with the same command. Each prompt must have
its trace once in both, with the same numbers; the memory of the undisturbed run is sampled.

    python tests/bench/batch.py                       # 20,000 prompts: minutes
    python tests/bench/batch.py --prompts 500 --kills 1
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import psutil
import reltrace
from bench.service import serving
from demo_model.corpus import held_out


def write_prompts(path: Path, count: int, seed: int) -> None:
    with path.open("w") as file:
        for number, example in enumerate(held_out(count, seed)):
            row = {"id": f"s{number}", "prompt": example.prompt}
            file.write(json.dumps(row) + "\n")


def start(source: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    command = ["batch", str(source), str(out), "--server", address, "--part-seconds", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "reltrace", *command, "--quiet"], stdout=subprocess.DEVNULL
    )


def traced(out: Path) -> int:
    return len(reltrace.load_batch(out)) if (out / "journal.sqlite").exists() else 0


def undisturbed(source: Path, out: Path, address: str) -> tuple[float, list[float]]:
    """Run to the end; return the seconds it took, and samples of its memory in MB."""
    began = time.monotonic()
    process = start(source, out, address)
    memory: list[float] = []
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory.append(watched.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            break
        # The period of the samples.
        time.sleep(0.25)
    assert process.wait() == 0
    return time.monotonic() - began, memory


def killed(
    source: Path, out: Path, address: str, seconds: float, kills: int, seed: int
) -> list[int]:
    """Kill a run at random moments, and let it end; return what was on disk after each kill."""
    rng = random.Random(seed)
    left = []
    for _ in range(kills):
        process = start(source, out, address)
        # The moment is what is random.
        time.sleep(1.0 + rng.uniform(0, seconds / (kills + 1)))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
        left.append(traced(out))
    assert start(source, out, address).wait() == 0
    return left


def compare(first: Path, second: Path, count: int) -> dict[str, Any]:
    """Compare two batches, trace by trace."""
    one, other = reltrace.load_batch(first), reltrace.load_batch(second)
    assert [trace.id for trace in one] == [f"s{number}" for number in range(count)]
    assert len(other) == count
    assert one.errors == other.errors == []
    same, largest = 0, 0.0
    for a, b in zip(one, other, strict=True):
        assert (a.id, a.token_ids, a.target.token_id) == (b.id, b.token_ids, b.target.token_id)
        same += bool(np.array_equal(a.relevance, b.relevance))
        scale = np.abs(a.relevance).max(axis=1, keepdims=True)
        largest = max(largest, float((np.abs(a.relevance - b.relevance) / scale).max()))
    return {"identical": same, "largest_difference_per_layer": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving("demo", RELTRACE_THREADS="1") as address:
        source, first, second = (Path(folder) / name for name in ("in.jsonl", "one", "other"))
        write_prompts(source, arguments.prompts, arguments.seed)
        seconds, memory = undisturbed(source, first, address)
        left = killed(source, second, address, seconds, arguments.kills, arguments.seed)
        report = {
            "prompts": arguments.prompts,
            "prompts_per_second": round(arguments.prompts / seconds, 1),
            "kills": arguments.kills,
            "traced_after_each_kill": left,
            **compare(first, second, arguments.prompts),
            # Without the first quarter, in which Python loads its modules.
            "memory_mb": {
                "after_a_quarter": round(memory[len(memory) // 4], 1),
                "half": round(memory[len(memory) // 2], 1),
                "end": round(memory[-1], 1),
                "most": round(max(memory), 1),
            },
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
