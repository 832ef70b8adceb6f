"""lxt beside current transformers, without its model zoo."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from reltrace_worker.lrp import RULES, lxt_functions


def test_a_process_keeps_no_stand_in() -> None:
    """
    Given a fresh process
    If the rules are imported, with warnings as errors
    I expect lxt's own functions, and no module in the place of lxt's zoo.
    """
    code = """
import sys
from reltrace_worker.lrp import RULES
from reltrace_worker.lrp import lxt_functions
import lxt.efficient.patches as patches
assert "lxt.efficient.models" not in sys.modules
assert lxt_functions.rms_norm_forward is patches.rms_norm_forward
assert lxt_functions.gated_mlp_forward is patches.gated_mlp_forward
assert lxt_functions.cp_gated_mlp_forward is patches.cp_gated_mlp_forward
assert lxt_functions.wrap_attention_forward is patches.wrap_attention_forward
assert RULES["cp_lrp"].wrap_attention is patches.cp_wrap_attention_forward
"""
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=100
    )


def test_without_lxt_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lxt_functions, "version", missing)
    with pytest.raises(ImportError, match=r"pip install --no-deps lxt==2\.1"):
        lxt_functions.import_patches()


def test_the_rules_have_their_public_names() -> None:
    assert list(RULES) == ["attnlrp", "cp_lrp", "gradient"]
    assert all(name == rule.name for name, rule in RULES.items())
