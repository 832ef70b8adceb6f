"""Rules: how relevance is propagated, applied to a model's instances, reversibly."""

from reltrace_worker.lrp.patching import apply_rule, verify_rule
from reltrace_worker.lrp.rules import RULES, Rule

__all__ = ["RULES", "Rule", "apply_rule", "verify_rule"]
