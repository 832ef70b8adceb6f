"""Benchmarks of the engine: against LXT's example, a plain forward pass, and itself.

Every measurement runs both sides in turns in this process and reports medians of ratios: the
machines are noisy, and a ratio of neighbours is not. Prints one JSON object.

    python tests/bench/engine.py                          # 135M shape: minutes
    python tests/bench/engine.py --shape tiny --prompts 4 --rounds 1
    python tests/bench/engine.py --only example --shape 135m --prompts 24
    python tests/bench/engine.py --device cuda --dtype bfloat16 --shape 8b --prompts 248
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from bench import example
from bench.models import SHAPES, Shape, build, job, prompts
from reference.peak import peak_bytes
from reltrace_worker.engine import Checkpointing, Engine
from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.targets import Readout
from reltrace_worker.lrp import RULES, apply_rule
from reltrace_worker.lrp.linear import linear_layers, through_onednn
from reltrace_worker.lrp.ops import compile_functions
from reltrace_worker.models.loading import LoadedModel, ModelShape
from reltrace_worker.types.jobs import TraceJob
from reltrace_worker.types.results import JobResult

Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], object]) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def in_turns(device: torch.device, rounds: int, *sides: Callable[[], object]) -> list[list[float]]:
    """Seconds of each side, [rounds][sides]; every side has run before, to warm up."""
    return [[timed(device, side) for side in sides] for _ in range(rounds)]


def ratios(times: list[list[float]], over: int, under: int) -> Row:
    found = [row[over] / row[under] for row in times]
    return {
        "median": round(statistics.median(found), 3),
        "least": round(min(found), 3),
        "most": round(max(found), 3),
    }


def passes_of(jobs: list[TraceJob], max_tokens: int) -> list[list[TraceJob]]:
    """Jobs in passes, in the order of arrival, as a worker packs them."""
    packs: list[list[TraceJob]] = [[]]
    for each in jobs:
        tokens = sum(len(other.token_ids) for other in packs[-1])
        if packs[-1] and tokens + len(each.token_ids) > max_tokens:
            packs.append([])
        packs[-1].append(each)
    return packs


def run_all(engine: Engine, packs: list[list[TraceJob]]) -> list[JobResult]:
    results = []
    for pack in packs:
        for result in engine.run(pack):
            assert isinstance(result, JobResult), result
            results.append(result)
    return results


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, as torch runs it: the median of ten."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    seconds = statistics.median(timed(device, lambda: left @ right) for _ in range(10))
    return 2 * size**3 / seconds


def forward_flops(shape: ModelShape, weights: int, inputs: list[list[int]]) -> float:
    """Multiplications and additions of one forward pass over all prompts, causal attention halved.

    `weights` are those of the linear layers inside the decoder layers.
    """
    tokens = sum(map(len, inputs))
    products = 2 * (weights * tokens + shape.vocab_size * shape.hidden_size * len(inputs))
    attention = 4 * shape.layers * shape.hidden_size * sum(len(ids) ** 2 for ids in inputs) / 2
    return products + attention


def against_example(
    loaded: LoadedModel, inputs: list[list[int]], rounds: int, engine: Engine, every: int
) -> Row:
    """Prompts per second against LXT's example, prompt by prompt, checkpointed as documented.

    The example takes one of `every` so many prompts.
    """
    packs = passes_of([job(ids) for ids in inputs], engine.token_budget())

    def theirs() -> list[torch.Tensor]:
        with example.patched(loaded.model):
            return [example.trace(loaded.model, ids) for ids in inputs[::every]]

    ours = run_all(engine, packs)
    errors = []
    for result, reference in zip(ours[::every], theirs(), strict=True):
        difference = (result.tensors[0].values - reference).abs().amax(-1)
        errors.append(float((difference / reference.abs().amax(-1)).max()))
    # Seconds per prompt.
    times = [
        [example_s / len(inputs[::every]), engine_s / len(inputs)]
        for example_s, engine_s in in_turns(
            loaded.device, rounds, theirs, lambda: run_all(engine, packs)
        )
    ]
    checkpointing = sorted({result.checkpointing for result in ours})
    layers = loaded.family.decoder_layers(loaded.model)
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    # A backward pass to the activations alone has the products of a forward pass.
    flops = forward_flops(loaded.shape, weights, inputs) * (3 if checkpointing == [True] else 2)
    ours_per_second = 1 / statistics.median(r[1] for r in times)
    rate, peak = flops / len(inputs) * ours_per_second, matmul_peak(loaded.device, loaded.dtype)
    return {
        "prompts": len(inputs),
        "prompts_of_the_example": len(inputs[::every]),
        "tokens": sum(map(len, inputs)),
        "passes": len(packs),
        "checkpointing": checkpointing,
        "example_prompts_per_second": round(1 / statistics.median(r[0] for r in times), 3),
        "engine_prompts_per_second": round(ours_per_second, 3),
        "speedup": ratios(times, 0, 1),
        "tokens_per_second": round(sum(map(len, inputs)) / len(inputs) * ours_per_second, 1),
        "tflops": round(rate / 1e12, 3),
        "matmul_peak_tflops": round(peak / 1e12, 3),
        "share_of_matmul_peak": round(rate / peak, 3),
        "difference_per_layer": {"median": statistics.median(errors), "largest": max(errors)},
        "goal": 15.0 if loaded.device.type == "cuda" else 4.0,
    }


def against_forward(loaded: LoadedModel, inputs: list[list[int]], rounds: int) -> Row:
    """The cost of a trace against a plain forward pass of the same pack."""
    jobs = [job(ids) for ids in inputs]
    pack = PackedBatch.of(sorted(jobs, key=lambda job: len(job.token_ids)))

    def forward() -> None:
        # The untouched functions, the same products and packing, logits at the same positions.
        onednn = through_onednn(linear_layers(loaded.model))
        with torch.no_grad(), apply_rule(loaded.model, RULES["gradient"]), onednn:
            loaded.model(
                input_ids=pack.token_ids(loaded.device),
                position_ids=pack.position_ids(loaded.device),
                use_cache=False,
                logits_to_keep=Readout(loaded, pack).rows,
                packing=pack.packing,
            )

    off, on = Engine(loaded, "off"), Engine(loaded, "on")
    sides = (forward, lambda: run_all(off, [jobs]), lambda: run_all(on, [jobs]))
    for side in sides:
        side()
    times = in_turns(loaded.device, rounds, *sides)
    return {
        "tokens": pack.packing.tokens,
        "forward_tokens_per_second": round(
            pack.packing.tokens / statistics.median(r[0] for r in times), 1
        ),
        "without_checkpointing": {**ratios(times, 1, 0), "goal": 2.3},
        "with_checkpointing": {**ratios(times, 2, 0), "goal": 3.3},
    }


def peaks(loaded: LoadedModel, tokens: int) -> Row:
    jobs = [job([i % loaded.shape.vocab_size for i in range(tokens)])]
    settings: tuple[Checkpointing, ...] = ("off", "on")
    found: Row = {}
    for setting in settings:
        engine = Engine(loaded, setting)
        found[setting] = peak_bytes(loaded, partial(engine.run, jobs))
    return found


def memory(shape: Shape, dtype: torch.dtype, device: str, tokens: int) -> Row:
    """Peak bytes of a pass, weights not counted, against length and depth."""
    length = replace(shape, layers=min(shape.layers, 8))
    loaded = build(length, dtype, device)
    by_length = {n: peaks(loaded, n) for n in (tokens // 4, tokens // 2, tokens)}
    by_depth = {}
    for depth in (4, 16, 64):
        # Depth alone is in question: a narrow model shows it as well, and takes less time.
        narrow = replace(
            shape,
            layers=depth,
            hidden_size=shape.hidden_size // 3,
            heads=shape.heads // 3,
            key_value_heads=max(1, shape.key_value_heads // 3),
            intermediate_size=shape.intermediate_size // 3,
            vocab_size=320,
        )
        by_depth[depth] = peaks(build(narrow, dtype, device), tokens // 4)
    deep, shallow = by_depth[64], by_depth[4]
    return {
        "bytes_by_length": by_length,
        "layers_of_length": length.layers,
        "bytes_by_depth": by_depth,
        "growth_4_to_64_layers": {
            "off": round(deep["off"] / shallow["off"], 2),
            "on": round(deep["on"] / shallow["on"], 2),
            "goal_on": 4.0,
        },
    }


def precision(shape: Shape, device: str, inputs: list[list[int]]) -> Row:
    """The error of bfloat16: |R16 - R32| over the largest |R32| of each layer, and correlation."""
    exact = build(shape, torch.float32, device)
    jobs = [job(ids) for ids in inputs]
    wanted = run_all(Engine(exact), [jobs])
    # The same token on both sides: with random weights the two largest logits may change places.
    jobs = [
        replace(
            each,
            targets=(
                replace(
                    each.targets[0],
                    terms=(replace(each.targets[0].terms[0], token_id=result.targets[0].token_id),),
                ),
            ),
        )
        for each, result in zip(jobs, wanted, strict=True)
    ]
    rough = build(shape, torch.bfloat16, device)
    errors, correlations = [], []
    for ours, reference in zip(run_all(Engine(rough), [jobs]), wanted, strict=True):
        values, exact_values = ours.tensors[0].values, reference.tensors[0].values
        for layer, wanted_layer in zip(values, exact_values, strict=True):
            errors.append(float((layer - wanted_layer).abs().max() / wanted_layer.abs().max()))
        pair = torch.stack([values.flatten(), exact_values.flatten()])
        correlations.append(float(torch.corrcoef(pair)[0, 1]))
    return {
        "median": round(statistics.median(errors), 4),
        "most": round(max(errors), 4),
        "correlation": round(statistics.median(correlations), 4),
    }


PARTS = ("example", "forward", "memory", "precision")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--example-every", type=int, default=1, help="it takes one of so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="the rules' element-wise functions")
    parser.add_argument("--only", choices=PARTS, action="append")
    return parser.parse_args()


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    shape = SHAPES[given.shape]
    if given.layers:
        shape = replace(shape, layers=given.layers)
    dtype = getattr(torch, given.dtype)
    parts = given.only or PARTS
    inputs = prompts(given.prompts, given.shortest, given.longest, shape.vocab_size, given.seed)
    report: Row = {
        "shape": {"name": given.shape, **asdict(shape)},
        "dtype": given.dtype,
        "device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
        "threads": given.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seed": given.seed,
        "rounds": given.rounds,
    }
    if "example" in parts or "forward" in parts:
        loaded = build(shape, dtype, given.device)
        report["attention"] = Engine(loaded).attention
        if "example" in parts:
            if given.compile:
                compile_functions(loaded.device, loaded.dtype)
            engine = Engine(loaded)
            report["example"] = against_example(
                loaded, inputs, given.rounds, engine, given.example_every
            )
        if "forward" in parts:
            report["forward"] = against_forward(loaded, inputs, given.rounds)
        del loaded
    if "memory" in parts:
        report["memory"] = memory(shape, dtype, given.device, given.longest)
    if "precision" in parts:
        few = prompts(4, given.shortest, given.longest // 4, shape.vocab_size, given.seed)
        report["bfloat16"] = precision(shape, given.device, few)
    report["load_after"] = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
