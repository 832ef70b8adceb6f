"""Norms whose LRP function is not among lxt's patch functions."""

from __future__ import annotations

from typing import Any

import torch


def plus_one_norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
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

    Returns
    -------
    torch.Tensor
        Of the shape and dtype of `x`.
    """
    exact = x.float()
    inverse = torch.rsqrt(exact.detach().pow(2).mean(-1, keepdim=True) + self.eps)
    scale: torch.Tensor = 1.0 + self.weight.float()
    return (exact * inverse * scale).type_as(x)
