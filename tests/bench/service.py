"""A prompt file through the whole service, against LXT's example prompt by prompt.

The service is `reltrace up`: client, gRPC, scheduler, Redis and one worker, all on this machine.
The example runs in this process. Both have the same cores and take turns, so that what the
machine does besides hits both; the figure is the median of the ratios. Prints one JSON object.

    python tests/bench/service.py                         # 135M shape: minutes
    python tests/bench/service.py --model smollm2         # a real model and English text
    python tests/bench/service.py --model tiny --prompts 8 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import reltrace
import torch
from bench import example
from bench.models import SHAPES, load, prompts_for

ROUND_TRIPS = 100

MANY, MANY_OF_TOKENS = 32, 20
"""Targets, and tokens, of the one job that has many."""


@contextmanager
def serving(checkpoint: Path | str, **settings: str) -> Iterator[str]:
    """Run `reltrace up` with one model; gives its address."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("RELTRACE_")}
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryFile("w+") as said:
        service = subprocess.Popen(
            [sys.executable, "-m", "reltrace", "up", "--port", "0", "--data", data,
             "--model", str(checkpoint)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=own | settings,
        )  # fmt: skip
        try:
            assert service.stdout is not None
            ready = service.stdout.readline()
            if not ready:
                said.seek(0)
                raise RuntimeError(said.read())
            yield ready.partition(" ready at ")[2].split()[0]
        finally:
            service.send_signal(signal.SIGTERM)
            service.communicate(timeout=60)


def through_service(client: reltrace.Client, inputs: list[list[int]]) -> list[reltrace.Trace]:
    traces = []
    for trace in client.trace_many([{"input_ids": ids} for ids in inputs], ordered=True):
        assert isinstance(trace, reltrace.Trace), trace
        traces.append(trace)
    return traces


def round_trips(client: reltrace.Client) -> dict[str, float]:
    """Milliseconds of one short job at a time, above the engine's own time."""
    seconds = []
    for index in range(ROUND_TRIPS + 10):
        started = time.perf_counter()
        trace = client.trace(input_ids=[1, 2, 3, 4, index])
        # The first ones warm connections and caches.
        if index >= 10:
            seconds.append(time.perf_counter() - started - trace.timings.engine)
    return {
        "median": round(1000 * float(np.median(seconds)), 2),
        "p99": round(1000 * float(np.quantile(seconds, 0.99)), 2),
    }


def with_many_targets(
    client: reltrace.Client, inputs: list[list[int]], rounds: int
) -> dict[str, float]:
    """Seconds of one prompt with many targets beside others, over those of both apart."""
    many = {"input_ids": inputs[0][:MANY_OF_TOKENS], "target": list(range(MANY))}
    others = [{"input_ids": ids} for ids in inputs]

    def seconds(items: list[dict[str, Any]]) -> float:
        started = time.perf_counter()
        for result in client.trace_many(items):
            assert not isinstance(result, reltrace.Failure), result
        return time.perf_counter() - started

    seconds([many])
    found = [seconds([many, *others]) / (seconds(others) + seconds([many])) for _ in range(rounds)]
    return {
        "targets": MANY,
        "tokens": len(inputs[0][:MANY_OF_TOKENS]),
        "others": len(others),
        "together_over_apart": round(statistics.median(found), 3),
        "least": round(min(found), 3),
        "most": round(max(found), 3),
        "goal": 1.1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = ", ".join(SHAPES)
    parser.add_argument("--model", default="135m", help=f"a shape ({shapes}), or a real one")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--example-every", type=int, default=1, help="it takes one of so many")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes for the while")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load(given.model, getattr(torch, given.dtype), given.device)
    inputs = prompts_for(loaded, given.prompts, given.shortest, given.longest)
    every = given.example_every

    def theirs() -> list[torch.Tensor]:
        with example.patched(loaded.model):
            return [example.trace(loaded.model, ids) for ids in inputs[::every]]

    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        checkpoint: Path | str = given.model
        if given.model in SHAPES:
            checkpoint = Path(folder) / given.model
            loaded.model.save_pretrained(checkpoint)
            loaded.tokenizer.save_pretrained(checkpoint)
        settings = {
            "RELTRACE_THREADS": str(given.threads),
            "RELTRACE_DEVICE": given.device,
            "RELTRACE_DTYPE": given.dtype,
        }
        with serving(checkpoint, **settings) as address, reltrace.Client(address) as client:
            errors = []
            traces = through_service(client, inputs)
            for trace, expected in zip(traces[::every], theirs(), strict=True):
                reference = expected.numpy()
                largest = np.abs(reference).max(axis=1)
                errors.append((np.abs(trace.relevance - reference).max(axis=1) / largest).max())
            times: list[tuple[float, float]] = []
            for _ in range(given.rounds):
                started = time.perf_counter()
                theirs()
                between = time.perf_counter()
                through_service(client, inputs)
                ended = time.perf_counter()
                of_example, of_service = between - started, ended - between
                # Seconds per prompt.
                times.append((of_example / len(inputs[::every]), of_service / len(inputs)))
            overhead = round_trips(client)
            neighbours = with_many_targets(client, inputs, given.rounds)
    ratios = [example_time / service_time for example_time, service_time in times]
    report: dict[str, Any] = {
        "model": given.model,
        "dtype": given.dtype,
        "device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
        "threads": given.threads,
        "cores": os.cpu_count(),
        "prompts": len(inputs),
        "tokens": sum(map(len, inputs)),
        "example_prompts_per_second": round(1 / statistics.median(t[0] for t in times), 3),
        "service_prompts_per_second": round(1 / statistics.median(t[1] for t in times), 3),
        "speedup": {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
            "goal": 15.0 if given.device != "cpu" else 4.0,
        },
        "many_targets_beside_others": neighbours,
        "round_trip_above_engine_ms": overhead | {"goal_median": 2.5, "goal_p99": 5.0},
        "difference_per_layer": {
            "median": float(statistics.median(errors)),
            "largest": float(max(errors)),
        },
        "load_after": [round(x, 2) for x in os.getloadavg()],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
