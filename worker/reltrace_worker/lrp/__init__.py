"""How LXT is applied to a model: rules as small objects, on instances, reversibly."""

from reltrace_worker.lrp.patching import apply_rule, verify_rule
from reltrace_worker.lrp.rule import RULES, Rule

__all__ = ["RULES", "Rule", "apply_rule", "verify_rule"]
