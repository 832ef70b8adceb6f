"""Device kernels of a trace pass, counted on a CPU: what the same pass would launch on a GPU.

Every operation that torch dispatches is one kernel, unless it only makes a view, allocates, or is
a plain copy (a memcpy on CUDA, not a kernel). A function that the engine marks for torch's compiler
counts as one if `compiled`. No test shows that inductor makes one kernel of each: in the code that
it generated for CUDA with triton 3.6 it did, but for the backward pass of partial rotary
embeddings, which became three. Attention is that of the kernel ``varlen``, one operation forward
and one backward. Inside it, flash attention launches one kernel forward; backward three, and two
more to sum up grouped heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from reltrace_worker.engine import Engine
from reltrace_worker.lrp import attention, ops
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.types.jobs import TraceJob
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FLASH_BACKWARD = 5
"""Kernels inside one backward pass of flash attention, with grouped heads."""


def _storages(values: Any) -> set[int]:
    return {
        value.untyped_storage()._cdata for value in tree_leaves(values)
        if isinstance(value, torch.Tensor)
    }  # fmt: skip


def _is_memcpy(source: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        source.dtype == target.dtype
        and source.shape == target.shape
        and source.is_contiguous()
        and target.is_contiguous()
    )


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self._inside = 0

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Count what runs in the block as one kernel."""
        if not self._inside:
            self.kernels[name] += 1
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._inside and self._launches(func, args, kwargs, output):
            self.kernels[str(func)] += 1
        return output

    def _launches(self, func: Any, args: Any, kwargs: Any, output: Any) -> bool:
        name = func.overloadpacket.__name__
        if name == "copy_":
            return not _is_memcpy(args[1], args[0])
        if name == "clone":
            return not _is_memcpy(args[0], output)
        if name.startswith(("empty", "new_empty", "_local_scalar_dense")):
            return False
        if func._schema.is_mutable:
            return True
        return bool(_storages(output) - _storages((args, kwargs)))


class _Varlen(torch.autograd.Function):
    """Attention of one prompt, by plain products."""

    @staticmethod
    def forward(ctx: Any, count: Any, q: Any, k: Any, v: Any, scale: Any) -> torch.Tensor:
        ctx.count, ctx.scale = count, scale
        ctx.save_for_backward(q, k, v)
        with count("attention"):
            return _attention(q, k, v, scale)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        with ctx.count("attention_backward"), torch.enable_grad():
            states = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            found = torch.autograd.grad(_attention(*states, ctx.scale), states, outer[0])
            gradients = [gradient.contiguous() for gradient in found]
        return None, *gradients, None


def _attention(q: Any, k: Any, v: Any, scale: Any) -> torch.Tensor:
    states = (t.transpose(0, 1)[None] for t in (q, k, v))
    found: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
        *states, is_causal=True, scale=scale, enable_gqa=True
    )
    return found[0].transpose(0, 1).contiguous()


def kernels_of(run: Callable[[], object], compiled: bool) -> Counter[str]:
    """Count the kernels that `run` would launch on a GPU, by name."""
    operations = _Operations()

    def varlen(q: Any, k: Any, v: Any, *_: Any, scale: Any, **__: Any) -> torch.Tensor:
        return _Varlen.apply(operations.as_one, q, k, v, scale)  # type: ignore[no-any-return, no-untyped-call]

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with operations.as_one(function.__name__):
                return function(*args)

        return run

    with (
        mock.patch.object(attention, "kernel_for", return_value=attention.VARLEN),
        mock.patch.object(attention, "varlen_attn", varlen),
        mock.patch.object(ops, "_compiled", compiled),
        mock.patch.object(ops, "_program", program),
        operations,
    ):
        run()
    return operations.kernels


def kernels_per_layer(
    shallow: LoadedModel, deep: LoadedModel, job: TraceJob, compiled: bool
) -> Counter[str]:
    """Count the kernels of a decoder layer, forward and backward, by name.

    The models differ by one layer. Their pass holds one prompt.
    """
    less, more = (
        kernels_of(partial(Engine(loaded, "off").run, [job]), compiled)
        for loaded in (shallow, deep)
    )
    more.subtract(less)
    return Counter({name: count for name, count in more.items() if count})
