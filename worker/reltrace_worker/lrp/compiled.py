"""The rules with their element-wise functions compiled by ``torch.compile``.

What is compiled is what walks over a tensor more than once and has no hook inside: norms and
gated products, forward and backward. Modules, their hooks, linear layers and attention stay as
they are, so that every site and both ways of checkpointing work as without. A compiled function
rounds in other places than torch's own, which tests bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from reltrace_worker.lrp import fused
from reltrace_worker.lrp.fused import Kernels
from reltrace_worker.lrp.norms import PLUS_ONE_NORM, plus_one_norm_forward
from reltrace_worker.lrp.rule import RULES, Rule
from reltrace_worker.types.errors import ModelError


def _compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    # Packs have any length: one program for all of them.
    program = torch.compile(function, dynamic=True)

    def run(*arguments: Any) -> Any:
        # An autograd function calls it, so that there is no graph to see here; to torch's
        # compiler, tensors with one would be other tensors, and another program.
        return program(*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))

    return run


@cache
def _compiled(kernels: Kernels) -> Kernels:
    return Kernels(_compiled_function(kernels.forward), _compiled_function(kernels.backward))


_KERNELS: dict[Any, Kernels] = {
    fused.rms_norm_forward: fused.RMS_NORM,
    plus_one_norm_forward: PLUS_ONE_NORM,
    fused.gated_mlp_forward: fused.GATED_PRODUCT,
}


def _with_compiled_kernels(forward: Any) -> Any:
    # What has none of these (CP-LRP's gate is one product) stays as it is.
    kernels = _KERNELS.get(forward)
    return forward if kernels is None else partial(forward, kernels=_compiled(kernels))


@cache
def compiled_rule(name: str) -> Rule:
    """Return a rule whose element-wise functions are compiled when they are first called.

    Parameters
    ----------
    name
        One of ``RULES``. A rule that changes no such function comes back as it is.
    """
    rule = RULES[name]
    return replace(
        rule,
        norm=_with_compiled_kernels(rule.norm),
        plus_one_norm=_with_compiled_kernels(rule.plus_one_norm),
        gated_mlp=_with_compiled_kernels(rule.gated_mlp),
    )


def check_compiler(device: torch.device, dtype: torch.dtype) -> None:
    """Compile one of the functions, to see that this machine can.

    Raises
    ------
    ModelError
        It can not: torch needs a C++ compiler on a CPU, and Triton on CUDA.
    """
    hidden = torch.ones((1, 2, 8), dtype=dtype, device=device)
    try:
        _compiled(fused.RMS_NORM).forward(hidden, hidden[0, 0], 1e-6)
    except Exception as error:
        needed = "Triton" if device.type == "cuda" else "a C++ compiler"
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"torch can not compile on {device}, where it needs {needed}: "
            + (reason[0] if reason else type(error).__name__)
        ) from error
