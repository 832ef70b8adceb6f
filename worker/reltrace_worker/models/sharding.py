"""Tensor parallelism: every process of a worker holds a part of each layer's weights.

As in Shoeybi et al., "Megatron-LM", 2019, and in transformers' plans for these models: projections
into heads and neurons are divided by their outputs, those out of them by their inputs, and what is
partial is summed up over all processes: outputs in the forward pass, gradients of inputs in the
backward pass. So the residual stream and its gradient are whole in every process, and the same but
for rounding; the logits are those of the first one. Embeddings, norms and the output head are not
divided. Everything else about a layer is as in the whole model: its modules are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from reltrace_worker.models.families import Family
from reltrace_worker.types.errors import ModelError

WAIT = timedelta(hours=2)
"""Longest wait for another process: where large models are loaded one after the other. That a
process has died, or hangs in a pass, is noticed otherwise."""

HEADS, NEURONS = "heads", "neurons"
"""What a tensor may be divided by."""

_INTO = {
    HEADS: ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    NEURONS: ("gate_proj", "up_proj", "gate_up_proj"),
}
_OUT_OF = {HEADS: "o_proj", NEURONS: "down_proj"}


class Ranks:
    """A process among those that compute a model together; alone, unless told otherwise.

    `store` is the store of torch.distributed that they share, for them to meet.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._models = count()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Load one process after the other: the host then holds one whole model at a time."""
        model = next(self._models)
        if self._store is not None and self.rank:
            self._store.wait([f"{model} {self.rank - 1}"], WAIT)
        yield
        if self._store is not None:
            self._store.set(f"{model} {self.rank}", "")


def check_sizes(config: Any, family: Family, size: int) -> None:
    """Raise `ModelError` where a model can not be divided among so many processes."""
    parts = {"neurons": config.intermediate_size}
    if family.heads_are_independent:
        parts["heads"] = config.num_attention_heads
        parts["key-value heads"] = config.num_key_value_heads
    common = math.gcd(*parts.values())
    if common % size:
        counts = ", ".join(f"{count} {name}" for name, count in parts.items())
        allowed = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
        raise ModelError(
            f"--tensor-parallel {size} does not divide the model, whose layers have {counts}; "
            f"allowed: {allowed or 'only 1'}"
        )


def shard(model: PreTrainedModel, family: Family, ranks: Ranks) -> frozenset[str]:
    """Keep this process's part of a model; return by what its tensors are divided."""
    config: Any = model.config
    check_sizes(config, family, ranks.size)
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    divided = frozenset((NEURONS, HEADS) if family.heads_are_independent else (NEURONS,))
    # The parts of fused projections, by how many of their outputs they are.
    fused = {"qkv_proj": (queries, keys, keys), "gate_up_proj": (1, 1)}
    for layer in family.decoder_layers(model):
        modules = {path.rpartition(".")[2]: module for path, module in layer.named_modules()}
        for axis in divided:
            into = [name for name in _INTO[axis] if name in modules]
            entrance = _Entrance(len(into))
            for name in into:
                _keep_outputs(modules[name], fused.get(name, (1,)), ranks)
                modules[name].register_forward_pre_hook(entrance)
            _keep_inputs(modules[_OUT_OF[axis]], ranks)
            modules[_OUT_OF[axis]].register_forward_hook(_sum_output)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.register_forward_hook(_first_output)
    if HEADS in divided:
        # Phi-3 reads both while it computes.
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
        config.num_attention_heads //= ranks.size
        config.num_key_value_heads //= ranks.size
        for module in model.modules():
            if "num_key_value_heads" in vars(module):
                module.num_key_value_heads = config.num_key_value_heads
    return divided


def _keep_outputs(linear: Any, parts: Sequence[int], ranks: Ranks) -> None:
    def kept(rows: torch.Tensor) -> nn.Parameter:
        unit = len(rows) // sum(parts)
        pieces = torch.split(rows, [unit * part for part in parts])
        mine = [piece.chunk(ranks.size)[ranks.rank] for piece in pieces]
        return nn.Parameter(torch.cat(mine), requires_grad=False)

    linear.weight = kept(linear.weight)
    if linear.bias is not None:
        linear.bias = kept(linear.bias)
    linear.out_features = len(linear.weight)


def _keep_inputs(linear: Any, ranks: Ranks) -> None:
    mine = linear.weight.chunk(ranks.size, dim=1)[ranks.rank]
    linear.weight = nn.Parameter(mine.clone(), requires_grad=False)
    linear.in_features = mine.shape[1]
    if ranks.rank:
        # Added once.
        linear.bias = None


class _Entrance:
    """Where a whole tensor enters divided projections: their gradients of it are summed up.

    Projections of one tensor, of which there are `readers`, share one sum.
    """

    def __init__(self, readers: int) -> None:
        self._readers = self._left = readers
        self._whole: torch.Tensor | None = None
        self._entered: torch.Tensor | None = None

    def __call__(self, _: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor | None]:
        (whole,) = args
        if self._whole is not whole:
            self._left, self._whole = self._readers, whole
            self._entered = _SumGradients.apply(whole)  # type: ignore[no-untyped-call]
        self._left -= 1
        entered = self._entered
        if not self._left:
            self._whole = self._entered = None
        return (entered,)


class _SumGradients(torch.autograd.Function):
    """A tensor as it is, whose gradients in all processes are summed up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> torch.Tensor:
        return _summed(outer[0])


class _Sum(torch.autograd.Function):
    """The sum of the tensors of all processes; each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return outer[0]


def _sum_output(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = _Sum.apply(output)  # type: ignore[no-untyped-call]
    return total


class _First(torch.autograd.Function):
    """The tensor of the first process in all of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        first = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, 0)
        return first

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return outer[0]


def _first_output(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
    # Which token is the largest, or is drawn, must not depend on how a process has rounded.
    first: torch.Tensor = _First.apply(logits)  # type: ignore[no-untyped-call]
    return first


def _summed(x: torch.Tensor) -> torch.Tensor:
    # A copy: others may hold the tensor.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def gather(part: torch.Tensor, ranks: Ranks) -> torch.Tensor | None:
    """Join the parts of a tensor, [..., width / ranks], in the first process; None elsewhere."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(ranks.size)] if not ranks.rank else None
    dist.gather(part, parts)
    return None if parts is None else torch.cat(parts, dim=-1)
