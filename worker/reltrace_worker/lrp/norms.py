"""Norms whose LRP function is not among lxt's patch functions."""

from __future__ import annotations

from typing import Any

import torch

from reltrace_worker.lrp.fused import Kernels, normalize


def _forward(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = x.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * inverse).mul_(1.0 + weight.float()).type_as(x), inverse


def _backward(outer: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (outer.float() * (1.0 + weight.float())).mul_(inverse).type_as(outer)


PLUS_ONE_NORM = Kernels(_forward, _backward)


def plus_one_norm_forward(
    self: Any, x: torch.Tensor, kernels: Kernels = PLUS_ONE_NORM
) -> torch.Tensor:
    """Identity rule on a norm that multiplies by one plus its weight, in float32 (Gemma 3).

    The gradient does not flow through the root mean square, as ``gemma3_norm`` has it in
    ``lxt/efficient/models/gemma3.py`` (lxt 2.1); values are those of transformers'
    ``Gemma3RMSNorm``.

    Parameters
    ----------
    self
        The norm: ``weight`` [width] and ``eps``.
    x
        [..., width].
    kernels
        ``PLUS_ONE_NORM``, or what it compiles to.

    Returns
    -------
    torch.Tensor
        Of the shape and dtype of `x`.
    """
    return normalize(x, self.weight, self.eps, kernels)
