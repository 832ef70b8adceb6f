"""LXT's own functions as rules: those of its maps, with the numbers of the fused ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from reference.checkpoints import LXT_RECIPES
from reference.loaded import PROMPTS, Checkpoints, prepare, run
from reltrace_worker.engine import SITES, Engine
from reltrace_worker.lrp import RULES, lxt_rules, verify_rule
from reltrace_worker.models import FAMILIES
from reltrace_worker.types.errors import ModelError
from reltrace_worker.types.jobs import TraceRequest

FAMILIES_OF_LXT = ("grouped", *LXT_RECIPES)


def test_a_process_keeps_no_stand_in() -> None:
    """
    Given a fresh process
    If LXT's rules are made, with warnings as errors
    I expect the functions of lxt's own maps, and no module in the place of lxt's zoo.
    """
    code = """
import sys
from reltrace_worker.lrp.lxt_rules import lxt_rules
from reltrace_worker.models import FAMILIES
rules = lxt_rules(FAMILIES["qwen2"])
import lxt.efficient.patches as patches
assert "lxt.efficient.models" not in sys.modules
found = {name: function for rule in rules.values() for _, function in rule.patches.values()
    for name in [(rule.name, function.__name__)] if rule.functions == "lxt"}
assert found == {
    ("attnlrp", "rms_norm_forward"): patches.rms_norm_forward,
    ("attnlrp", "gated_mlp_forward"): patches.gated_mlp_forward,
    ("cp_lrp", "rms_norm_forward"): patches.rms_norm_forward,
    ("cp_lrp", "cp_gated_mlp_forward"): patches.cp_gated_mlp_forward,
}
assert rules["attnlrp"].wrap_attention is patches.wrap_attention_forward
assert rules["cp_lrp"].wrap_attention is patches.cp_wrap_attention_forward
"""
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=100
    )


def test_the_fused_rules_do_not_import_lxt() -> None:
    code = """
import sys
sys.modules["lxt"] = None  # Every import of it fails.
import reltrace_worker.session.serving
assert not [name for name in sys.modules if name.startswith("lxt.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_without_lxt_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lxt_rules, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed.*pip install --no-deps lxt==2\.1"):
        lxt_rules.lxt_rules(FAMILIES["llama"])


@pytest.mark.parametrize("family", ["olmo2", "phi3"])
def test_a_family_that_lxt_does_not_have_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=f"no rules for the architecture '{family}'.*fused"):
        lxt_rules.lxt_rules(FAMILIES[family])


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", FAMILIES_OF_LXT)
def test_both_ways_give_the_same_numbers(checkpoints: Checkpoints, name: str, rule: str) -> None:
    """
    Given prompts in one pack, and every site in full
    If they are traced with LXT's functions, and with the fused ones
    I expect the same relevance, to 1e-5 of the largest of each layer.
    """
    loaded = checkpoints.loaded(name)
    jobs = prepare(loaded, *(TraceRequest(p, tuple(SITES), "full", rule=rule) for p in PROMPTS))
    fused = run(Engine(loaded), jobs)
    theirs = run(Engine(loaded, rules=lxt_rules.lxt_rules(loaded.family)), jobs)
    for ours, wanted in zip(fused, theirs, strict=True):
        for found, expected in zip(ours.tensors, wanted.tensors, strict=True):
            left, right = (
                (t.values if SITES[t.site].per_layer else t.values[None]).flatten(1)
                for t in (found, expected)
            )
            error = (left - right).abs().amax(1) / right.abs().amax(1)
            assert float(error.max()) <= 1e-5, (found.site, error)


@pytest.mark.parametrize("name", FAMILIES_OF_LXT)
def test_the_probe_passes_and_leaves_the_model_as_it_was(
    checkpoints: Checkpoints, name: str
) -> None:
    loaded = checkpoints.loaded(name)
    before: dict[str, Any] = {path: sorted(vars(m)) for path, m in loaded.model.named_modules()}
    rules = lxt_rules.lxt_rules(loaded.family)
    assert list(rules) == list(RULES)
    for rule in rules.values():
        verify_rule(loaded.model, rule)
    assert {path: sorted(vars(m)) for path, m in loaded.model.named_modules()} == before
