"""Compiled rules: the numbers of the others, at every site."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
from reference.loaded import DEVICE, Checkpoints
from reltrace_worker.engine import Engine
from reltrace_worker.engine.sites import SITES
from reltrace_worker.lrp import RULES, compiled, verify_rule
from reltrace_worker.lrp.fused import Kernels
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import Target, Term, TokenizedPrompt, TraceJob
from reltrace_worker.types.results import JobResult

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
    plain = Engine(loaded, checkpointing).run(jobs(rule))
    ours = Engine(loaded, checkpointing, compile=True).run(jobs(rule))
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


@needs_compiler
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_compiled_functions_are_the_ones_called(checkpoints: Checkpoints, rule: str) -> None:
    model = checkpoints.loaded("grouped").model
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    verify_rule(model, compiled.compiled_rule(rule))
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before


def test_only_what_is_element_wise_is_compiled() -> None:
    """
    Given the rules
    If they are compiled
    I expect other norms, and another gated MLP under AttnLRP; and the same attention.
    """
    for name, rule in RULES.items():
        ours = compiled.compiled_rule(name)
        assert ours.name == name
        assert ours.wrap_attention is rule.wrap_attention
        compiled_parts = {
            part
            for part in ("norm", "plus_one_norm", "gated_mlp")
            if getattr(ours, part) is not getattr(rule, part)
        }
        norms = {"norm", "plus_one_norm"}
        assert compiled_parts == {"attnlrp": norms | {"gated_mlp"}, "cp_lrp": norms}.get(
            name, set()
        )


def test_without_a_compiler_the_error_says_so(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Given a machine on which torch can not compile
    If an engine is to compile
    I expect an error that says what is missing.
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(compiled, "_compiled", lambda _: Kernels(refuse, refuse))
    with pytest.raises(ModelError, match=rf"compile on {DEVICE}.*, .*: Inv.* compiler found$"):
        Engine(checkpoints.loaded("grouped"), compile=True)
