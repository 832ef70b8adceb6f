"""Large linear layers on a CPU through oneDNN, in float32, where it is the faster library.

torch computes float32 products through another library, MKL on x86. oneDNN, which torch ships as
well and uses for bfloat16, needs 17 to 33 % less time for the same products on an AMD EPYC, and 1
to 31 % more on an Intel Xeon (``tests/bench/README.md``): the two are timed once per process. Their
numbers differ by rounding. oneDNN reads torch's weights as they are, forward and transposed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from reltrace_worker.lrp.patching import patched

# Below, oneDNN's overhead per call may be larger than what it saves.
_LEAST_WEIGHTS = 1 << 18

# Of what is timed: some ten milliseconds per round on one thread, in a layer of common size.
_ROWS, _INNER, _OUTER, _ROUNDS = 256, 512, 1024, 11
_GAIN = 0.93
"""oneDNN is used where it takes at most this share of the time of torch's own library."""


def is_available() -> bool:
    """Whether this torch has oneDNN, with the operator that torch's own compiler calls."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, with a gradient for x only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(outer[0], weight.t(), None), None, None


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return,no-untyped-call]


def _ratio(over: Callable[[], object], under: Callable[[], object]) -> float:
    """Return the time of one function over that of another, on one thread.

    Other programs may be running: CPU time counts, and the median of pairs next to each other.
    """

    def seconds(function: Callable[[], object]) -> float:
        began = time.thread_time()
        function()
        return time.thread_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        over(), under()  # The first call also prepares the product.
        return statistics.median(seconds(over) / seconds(under) for _ in range(_ROUNDS))
    finally:
        torch.set_num_threads(threads)


@cache
def onednn_is_faster() -> bool:
    """Whether this process computes large float32 layers through oneDNN: timed at the first call.

    Two products are timed, those of a forward and of a backward pass.
    """
    if not is_available():
        return False
    weight, x = torch.ones(_OUTER, _INNER), torch.ones(_ROWS, _INNER)
    outer = torch.ones(_ROWS, _OUTER)
    ratio = _ratio(
        lambda: (_product(x, weight, None), _product(outer, weight.t(), None)),
        lambda: (linear(x, weight), outer @ weight),
    )
    return ratio <= _GAIN


def linear_layers(model: nn.Module) -> tuple[nn.Linear, ...]:
    """Return the layers to be computed by oneDNN: large, frozen, float32, on a CPU.

    None where torch's own library is as fast.
    """
    layers = tuple(
        module
        for module in model.modules()
        # Not subclasses: quantized layers are some, and compute something else.
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= _LEAST_WEIGHTS
        and not any(parameter.requires_grad for parameter in module.parameters())
    )
    return layers if layers and onednn_is_faster() else ()


def through_onednn(layers: Iterable[nn.Linear]) -> AbstractContextManager[None]:
    """Compute the products of `linear_layers` by oneDNN until the block ends.

    A layer whose forward a rule has replaced keeps that.
    """
    free = (layer for layer in layers if "forward" not in vars(layer))
    return patched((layer, "forward", MethodType(_forward, layer)) for layer in free)
