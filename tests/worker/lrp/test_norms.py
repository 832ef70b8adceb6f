"""Norms that multiply by one plus their weight, against lxt's own function."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from lxt.efficient.rules import stop_gradient
from reltrace_worker.lrp.norms import plus_one_norm_forward
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm


def lxt_norm() -> Any:
    """``gemma3_norm`` of lxt's models/gemma3.py, without what that file imports."""
    spec = find_spec("lxt")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "efficient/models/gemma3.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "gemma3_norm"
    )
    names: dict[str, Any] = {"torch": torch, "stop_gradient": stop_gradient}
    exec(compile(ast.Module([function], []), "gemma3.py", "exec"), names)
    return names["gemma3_norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_value_and_gradient_are_those_of_lxt(dtype: torch.dtype, scale: float) -> None:
    """
    Given a norm whose `_norm` lxt has patched, as its map for Gemma 3 does
    If the same input passes through our forward
    I expect the same values, gradients, and the values of the norm as it was.
    """
    generator = torch.Generator().manual_seed(0)
    norm = Gemma3RMSNorm(16).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    x = (torch.randn(3, 5, 16, generator=generator) * scale).to(dtype).requires_grad_()
    start = torch.randn(3, 5, 16, generator=generator).to(dtype)
    plain = norm(x)
    norm._norm = MethodType(lxt_norm(), norm)
    theirs = norm(x)
    ours = plus_one_norm_forward(norm, x)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, plain)
    (gradient,) = torch.autograd.grad(ours, x, start)
    assert torch.equal(gradient, torch.autograd.grad(theirs, x, start)[0])
    assert not torch.allclose(gradient, torch.autograd.grad(plain, x, start)[0])
