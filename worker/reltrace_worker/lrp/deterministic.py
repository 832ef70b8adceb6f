"""Deterministic backward passes of attention on a GPU.

CUDA's attention kernels add up gradients in the order in which their blocks end, unless torch is
told to use deterministic algorithms; a fixed order took no more time where it was measured
(``tests/bench/README.md``). The setting is global and makes other operations fail, so it is on
only while the backward node of an attention kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_Setting = tuple[bool, bool, bool]
"""Deterministic, only warn of what is not, and fill new memory."""

# Filling new memory would be a kernel more for each gradient, which the kernel then writes whole.
_DETERMINISTIC: _Setting = (True, False, False)


def with_deterministic_backward(output: torch.Tensor) -> torch.Tensor:
    """Let the operation that returned `output` run its backward pass deterministically on CUDA."""
    if output.grad_fn is not None and output.device.type == "cuda":
        run_deterministically(output.grad_fn)
    return output


def run_deterministically(node: Any) -> None:
    """Use deterministic algorithms while a node of the autograd graph runs."""
    before: list[_Setting] = []

    def begin(_: Any) -> None:
        before.append(_setting())
        _restore(_DETERMINISTIC)

    def end(*_: Any) -> None:
        _restore(before.pop())

    node.register_prehook(begin)
    node.register_hook(end)


@contextmanager
def setting_restored() -> Iterator[None]:
    """Restore torch's setting when the block ends; a node that fails does not call its hook."""
    before = _setting()
    try:
        yield
    finally:
        _restore(before)


def _setting() -> _Setting:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
    )


def _restore(setting: _Setting) -> None:
    enabled, warn_only, fill = setting
    # Not `torch.use_deterministic_algorithms`, which also imports and sets torch's compiler: no
    # kernel is compiled meanwhile, and this is called twice per layer.
    torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)
    torch._C._set_deterministic_fill_uninitialized_memory(fill)
