"""The tables of rules."""

from __future__ import annotations

import pytest
from reltrace_worker.lrp import RULES
from reltrace_worker.models import FAMILIES


def test_the_rules_have_their_public_names() -> None:
    assert list(RULES) == ["attnlrp", "cp_lrp", "gradient"]
    assert all(name == rule.name for name, rule in RULES.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_every_lrp_rule_has_norms_and_gated_mlps_of_every_family(rule: str, family: str) -> None:
    patched = {FAMILIES[family].norm, FAMILIES[family].gated_mlp} & RULES[rule].patches.keys()
    assert len(patched) == (0 if rule == "gradient" else 2)
