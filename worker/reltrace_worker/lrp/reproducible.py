"""The same bits for the same pack, on a GPU too.

The backward passes of CUDA's attention kernels add what the parts of a prompt contribute in the
order in which the parts end, unless torch is told to be deterministic; then they add in a fixed
order, which took no more time where it was measured (``tests/bench/README.md``). The setting is
the process's own and makes other operations fail, of which torch has only one, quick kind. So it
holds while these kernels run, and not longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def in_fixed_order(output: torch.Tensor) -> torch.Tensor:
    """Have the operation that made `output` run its backward pass deterministically.

    Parameters
    ----------
    output
        Of one call of an attention kernel, as the kernel returned it. Where it carries no graph,
        or is not on a GPU, nothing happens.

    Returns
    -------
    torch.Tensor
        The same tensor.
    """
    if output.grad_fn is not None and output.device.type == "cuda":
        run_deterministically(output.grad_fn)
    return output


def sdpa(*arguments: Any, **options: Any) -> torch.Tensor:
    """Return ``scaled_dot_product_attention``, whose backward pass adds in a fixed order."""
    return in_fixed_order(scaled_dot_product_attention(*arguments, **options))


def run_deterministically(node: Any) -> None:
    """Have a node of a graph run under torch's deterministic algorithms."""
    before: list[tuple[bool, bool]] = []

    def begin(_: Any) -> None:
        before.append(_setting())
        torch.use_deterministic_algorithms(True)

    def end(*_: Any) -> None:
        _set(*before.pop())

    node.register_prehook(begin)
    node.register_hook(end)


@contextmanager
def setting_restored() -> Iterator[None]:
    """Leave torch's setting as it was, also where a node failed and did not end."""
    before = _setting()
    try:
        yield
    finally:
        _set(*before)


def _setting() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set(enabled: bool, warn_only: bool) -> None:
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
