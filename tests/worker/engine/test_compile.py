"""Compiled rules: the numbers of the others, at every site."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from reference.loaded import DEVICE, Checkpoints
from reltrace_worker.engine import Engine
from reltrace_worker.engine.recorder import row_relevance
from reltrace_worker.engine.sites import SITES
from reltrace_worker.lrp import RULES, ops
from reltrace_worker.lrp.rotary import Unrotated, attention_states
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import Target, Term, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult
from torch import nn


@pytest.fixture(autouse=True)
def compiled_for_this_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_compiled", False)
    ops._program.cache_clear()


CXX = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None, reason=f"torch.compile needs a C++ compiler: there is no {CXX}"
)
pytestmark = pytest.mark.filterwarnings(
    # torch's compiler uses much that torch deprecates.
    "ignore::DeprecationWarning"
)


def jobs(rule: str) -> list[TraceJob]:
    found = []
    for ids in ((3, 1, 4, 1, 5), (9,), tuple(range(30))):
        targets = tuple(Target((Term(len(ids) - 1, token),)) for token in (7, 8))
        found.append(
            TraceJob(TokenizedPrompt(ids, ("",) * len(ids)), targets, tuple(SITES), "full", rule)
        )
    return found


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("kind", ["grouped", "gemma3"])
def test_every_site_is_what_it_is_without(
    checkpoints: Checkpoints, kind: str, rule: str, checkpointing: Any
) -> None:
    """
    Given prompts of several lengths, two targets each, and every site in full
    If the rule's functions are compiled
    I expect the relevance of the uncompiled ones, to 1e-5 of the largest of each layer.
    """
    loaded = checkpoints.loaded(kind)
    engine = Engine(loaded, checkpointing)
    plain = engine.run(jobs(rule))
    ops.compile_functions(loaded.device, loaded.dtype)
    ours = engine.run(jobs(rule))
    for result, wanted in zip(ours, plain, strict=True):
        assert isinstance(result, JobResult)
        assert isinstance(wanted, JobResult)
        assert len(result.tensors) == 2 * len(SITES)
        for found, expected in zip(result.tensors, wanted.tensors, strict=True):
            assert (found.site, found.trace) == (expected.site, expected.trace)
            layers = found.values if SITES[found.site].per_layer else found.values[None]
            others = expected.values if SITES[found.site].per_layer else expected.values[None]
            largest = others.abs().flatten(1).amax(1)
            assert bool(((layers - others).abs().flatten(1).amax(1) <= 1e-5 * largest).all())


def outputs_and_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of every function that is compiled, on seeded inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x, scale = normal(1, 5, 48).requires_grad_(), normal(48)
    both = normal(1, 5, 96).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    heads = normal(1, 5, 8, 8).requires_grad_()
    states = [part.transpose(1, 2) for part in heads.split((4, 2, 2), dim=2)]
    angles = torch.randn(1, 5, 8, generator=generator).to(DEVICE)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key = (Unrotated(part, *tables) for part in states[:2])
    values = [
        ops.rms_norm(x, scale, 1e-6),
        ops.attnlrp_gated_product(nn.SiLU(), gate, up),
        *attention_states(query, key, states[2], (0.25, 0.25, 0.5)),
    ]
    outer = [normal(*value.shape) for value in values]
    gradients = torch.autograd.grad(values, (x, both, heads), outer)
    return [*(value.detach() for value in values), *gradients, row_relevance(x.detach(), scale)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_function_is_what_it_is_without() -> None:
    """
    Given bfloat16 and joined projections, as on a GPU, and the functions of the rules, which
    tests of their own compare with LXT and autograd
    If they are compiled
    I expect their values and gradients, to rounding.
    """
    dtype = torch.bfloat16
    plain = outputs_and_gradients(dtype)
    ops.compile_functions(torch.device(DEVICE), dtype)
    compiled = outputs_and_gradients(dtype)
    for ours, wanted in zip(compiled, plain, strict=True):
        assert ours.dtype == wanted.dtype
        assert float((ours - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())


@needs_compiler
def test_functions_are_compiled_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[str] = []

    def compile_(function: Any, dynamic: bool) -> Any:
        programs.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_)

    @ops.elementwise
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert double(torch.ones(())) == 2
    assert programs == []
    ops.compile_functions(torch.device(DEVICE), torch.float32)
    for _ in range(2):
        assert double(torch.ones(())) == 2
    assert programs.count("double") == 1


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Given a machine on which torch can not compile
    If functions are to be compiled
    I expect an error that says what is missing, and functions that run uncompiled.
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "_norm_forward", refuse)
        with pytest.raises(ModelError, match=rf"compile on {DEVICE}.*, .*: Inv.* compiler found$"):
            ops.compile_functions(torch.device(DEVICE), torch.float32)
    assert not ops._compiled
