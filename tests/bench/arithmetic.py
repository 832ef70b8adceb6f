"""How near a pass is to its arithmetic: operations, the peak of the machine, its products alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from bench.models import job
from bench.timing import Row, in_turns, ratios, timed
from reltrace_worker.engine import Engine
from reltrace_worker.models.loading import LoadedModel, ModelShape
from reltrace_worker.types.jobs import TraceJob
from reltrace_worker.types.results import JobResult


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


def against_products(loaded: LoadedModel, inputs: list[list[int]], rounds: int) -> Row:
    """The part of a pass's time that its matrix products alone take, by the faster library.

    The products of the linear layers of all decoder layers, forward and backward, over as many
    rows as the pack has; those of attention and of the few logits are not among them.
    """
    engine = Engine(loaded, "off")
    packs = passes_of([job(ids) for ids in inputs], engine.token_budget())
    layers = loaded.family.decoder_layers(loaded.model)
    weights = [p for layer in layers for p in layer.parameters() if p.dim() == 2]

    @torch.no_grad()
    def products(linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for pack in packs:
            rows = sum(len(each.token_ids) for each in pack)
            inputs_of = {
                width: torch.ones(rows, width, dtype=loaded.dtype, device=loaded.device)
                for weight in weights
                for width in weight.shape
            }
            for weight in weights:
                linear(inputs_of[weight.shape[1]], weight)
                linear(inputs_of[weight.shape[0]], weight.t())

    def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product

    libraries = {"torch": torch.nn.functional.linear}
    if loaded.device.type == "cpu" and loaded.dtype == torch.float32:
        libraries["onednn"] = onednn
    sides: list[Callable[[], object]] = [partial(products, linear) for linear in libraries.values()]
    sides.append(lambda: run_all(engine, packs))
    for side in sides:
        side()
    times = in_turns(loaded.device, rounds, *sides)
    shares = {name: ratios(times, n, len(libraries)) for n, name in enumerate(libraries)}
    seconds = {name: statistics.median(row[n] for row in times) for n, name in enumerate(libraries)}
    best = min(seconds, key=lambda name: seconds[name])
    return {
        "rows": sum(map(len, inputs)),
        "passes": len(packs),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "library": best,
        "share": shares[best],
        "goal": 0.85,
    }
