"""How long a worker takes to serve, beyond importing torch and transformers and loading weights.

One side is `reltrace-worker` with a checkpoint folder of the shape, from the start of the process
until a scheduler names its model as served; the other is a process that imports both libraries and
loads the same folder by `from_pretrained`. They take turns. Prints one JSON object.

    python tests/bench/start.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from bench.idle_service import process, scheduler_process, until_served
from bench.models import SHAPES, build

LOADING = """
import sys, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    threads = str(given.threads)
    loading, serving = [], []
    with tempfile.TemporaryDirectory() as folder:
        loaded = build(SHAPES[given.model], torch.float32)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        del loaded
        # The first round reads files that are not in memory yet, and does not count.
        for _ in range(given.rounds + 1):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", LOADING, folder, threads],
                check=True,
                capture_output=True,
                timeout=120,
            )
            loading.append(time.perf_counter() - started)
            with scheduler_process() as (address, _, _):
                command = [
                    sys.executable, "-m", "reltrace_worker", "--scheduler", address,
                    "--model", folder, "--name", "served", "--dtype", "float32",
                    "--device", "cpu", "--threads", threads, "--log-level", "error",
                ]  # fmt: skip
                started = time.perf_counter()
                with process(command):
                    until_served(address, {"served"})
                    serving.append(time.perf_counter() - started)
    beyond = [ours - theirs for ours, theirs in zip(serving[1:], loading[1:], strict=True)]
    report = {
        "model": given.model,
        "threads": given.threads,
        "cores": os.cpu_count(),
        "loading_seconds": round(statistics.median(loading[1:]), 2),
        "serving_seconds": round(statistics.median(serving[1:]), 2),
        "beyond_seconds": round(statistics.median(beyond), 2),
        "goal": 3.0,
        "load_after": [round(x, 2) for x in os.getloadavg()],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
