"""Benchmarks of the engine: against LXT, its own matrix products, a plain forward pass, and itself.

Every measurement runs both sides in turns in this process and reports medians of ratios: the
machines are noisy, and a ratio of neighbours is not. Prints one JSON object.

    python tests/bench/engine.py                          # 135M shape, random weights: minutes
    python tests/bench/engine.py --model smollm2 --only lxt   # a real model and English text
    python tests/bench/engine.py --model tiny --prompts 4 --rounds 1
    python tests/bench/engine.py --device cuda --dtype bfloat16 --model 8b --prompts 248
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from bench import example
from bench.arithmetic import against_products, forward_flops, matmul_peak, passes_of, run_all
from bench.models import SHAPES, Shape, build, job, load, prompts_for
from bench.timing import Row, in_turns, ratios, timed
from reference.peak import peak_bytes
from reltrace_worker.engine import Checkpointing, Engine
from reltrace_worker.engine.batch import PackedBatch
from reltrace_worker.engine.targets import Readout
from reltrace_worker.lrp import RULES, apply_rule
from reltrace_worker.lrp.joined import join_linear_layers
from reltrace_worker.lrp.linear import linear_layers, through_onednn
from reltrace_worker.lrp.ops import compile_functions
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.types.results import JobResult

TOGETHER = (4, 8, 16)
"""Prompts of a padded batch that are tried."""


def errors_of(ours: list[JobResult], references: list[torch.Tensor]) -> list[float]:
    """The largest difference of each trace, over the largest |R| of the layer."""
    errors = []
    for result, reference in zip(ours, references, strict=True):
        difference = (result.tensors[0].values - reference).abs().amax(-1)
        errors.append(float((difference / reference.abs().amax(-1)).max()))
    return errors


def against_lxt(
    loaded: LoadedModel, inputs: list[list[int]], rounds: int, engine: Engine, every: int
) -> Row:
    """Prompts per second against LXT's example, and against the best that a user could make of it.

    The example goes prompt by prompt, checkpointed as documented, over one of `every` so many.
    The best is one padded batch after another, not checkpointed, of the size that is fastest.
    """
    packs = passes_of([job(ids) for ids in inputs], engine.token_budget())

    def theirs() -> list[torch.Tensor]:
        with example.patched(loaded.model):
            return [example.trace(loaded.model, ids) for ids in inputs[::every]]

    def padded(together: int) -> list[torch.Tensor]:
        with example.patched(loaded.model, checkpointing=False):
            return example.trace_padded(loaded.model, inputs, together)

    ours = run_all(engine, packs)
    errors = errors_of(ours[::every], theirs())
    errors_of_padded = errors_of(ours, padded(TOGETHER[0]))
    together = min(TOGETHER, key=lambda size: timed(loaded.device, lambda: padded(size)))
    # Seconds per prompt.
    times = [
        [example_s / len(inputs[::every]), padded_s / len(inputs), engine_s / len(inputs)]
        for example_s, padded_s, engine_s in in_turns(
            loaded.device, rounds, theirs, lambda: padded(together), lambda: run_all(engine, packs)
        )
    ]
    checkpointing = sorted({result.checkpointing for result in ours})
    layers = loaded.family.decoder_layers(loaded.model)
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    # A backward pass to the activations alone has the products of a forward pass.
    flops = forward_flops(loaded.shape, weights, inputs) * (3 if checkpointing == [True] else 2)
    example_s, padded_s, engine_s = (
        statistics.median(column) for column in zip(*times, strict=True)
    )
    rate, peak = flops / len(inputs) / engine_s, matmul_peak(loaded.device, loaded.dtype)
    return {
        "prompts": len(inputs),
        "prompts_of_the_example": len(inputs[::every]),
        "tokens": sum(map(len, inputs)),
        "passes": len(packs),
        "checkpointing": checkpointing,
        "example_prompts_per_second": round(1 / example_s, 3),
        "padded_prompts_per_second": round(1 / padded_s, 3),
        "engine_prompts_per_second": round(1 / engine_s, 3),
        "prompts_of_a_padded_batch": together,
        "speedup": ratios(times, 0, 2),
        "speedup_over_padded": ratios(times, 1, 2),
        "tokens_per_second": round(sum(map(len, inputs)) / len(inputs) / engine_s, 1),
        "tflops": round(rate / 1e12, 3),
        "matmul_peak_tflops": round(peak / 1e12, 3),
        "share_of_matmul_peak": round(rate / peak, 3),
        "difference_per_layer": {"median": statistics.median(errors), "largest": max(errors)},
        "difference_to_padded": {
            "median": statistics.median(errors_of_padded),
            "largest": max(errors_of_padded),
        },
        "goals": {"example": 4.0, "padded": 1.5},
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
        "without_checkpointing": {**ratios(times, 1, 0), "goal": 2.2},
        "with_checkpointing": {**ratios(times, 2, 0), "goal": 3.2},
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


def bfloat16(model: str, device: str, inputs: list[list[int]], rounds: int) -> Row:
    """Speed and error of bfloat16 against float32 of the same engine.

    The error is |R16 - R32| over the largest |R32| of each layer; beside it the correlation.
    """
    loaded = load(model, torch.float32, device)
    exact = Engine(loaded)
    jobs = [job(ids) for ids in inputs]
    wanted = run_all(exact, [jobs])
    # The same token on both sides: the two largest logits may change places.
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
    rough = Engine(load(model, torch.bfloat16, device))
    errors, correlations = [], []
    for ours, reference in zip(run_all(rough, [jobs]), wanted, strict=True):
        values, exact_values = ours.tensors[0].values, reference.tensors[0].values
        for layer, wanted_layer in zip(values, exact_values, strict=True):
            errors.append(float((layer - wanted_layer).abs().max() / wanted_layer.abs().max()))
        pair = torch.stack([values.flatten(), exact_values.flatten()])
        correlations.append(float(torch.corrcoef(pair)[0, 1]))
    times = in_turns(
        loaded.device, rounds, lambda: run_all(exact, [jobs]), lambda: run_all(rough, [jobs])
    )
    return {
        "speedup": ratios(times, 0, 1) | {"goal": 2.5},
        "median": round(statistics.median(errors), 4),
        "most": round(max(errors), 4),
        "correlation": round(statistics.median(correlations), 4),
    }


PARTS = ("lxt", "products", "forward", "memory", "bfloat16")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = ", ".join(SHAPES)
    parser.add_argument("--model", default="135m", help=f"a shape ({shapes}), or a real one")
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
    dtype = getattr(torch, given.dtype)
    parts = given.only or PARTS
    shape = SHAPES.get(given.model)
    loaded = load(given.model, dtype, given.device)
    if given.device != "cpu":
        # As a worker does.
        join_linear_layers(loaded.model)
    inputs = prompts_for(loaded, given.prompts, given.shortest, given.longest, given.seed)
    report: Row = {
        "model": given.model,
        "shape": asdict(loaded.shape),
        "dtype": given.dtype,
        "device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
        "threads": given.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seed": given.seed,
        "rounds": given.rounds,
        "attention": Engine(loaded).attention,
    }
    if "lxt" in parts:
        if given.compile:
            compile_functions(loaded.device, loaded.dtype)
        engine = Engine(loaded)
        report["lxt"] = against_lxt(loaded, inputs, given.rounds, engine, given.example_every)
    if "products" in parts:
        report["products"] = against_products(loaded, inputs, given.rounds)
    if "forward" in parts:
        report["forward"] = against_forward(loaded, inputs, given.rounds)
    del loaded
    if "memory" in parts and shape is not None:
        report["memory"] = memory(shape, dtype, given.device, given.longest)
    if "bfloat16" in parts:
        report["bfloat16"] = bfloat16(given.model, given.device, inputs, given.rounds)
    report["load_after"] = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
