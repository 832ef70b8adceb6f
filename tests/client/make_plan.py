"""The plan of an evaluation, for tests of its parts."""

from __future__ import annotations

from typing import Any

from reltrace.evaluation.plan import Plan


def plan(**given: Any) -> Plan:
    """A plan with the defaults of `evaluate`."""
    settings = {"rules": ["gradient"], "site": "embed", "points": 10, "seed": 0}
    settings |= {"measure": "logprob", "replace": "zero", "keep": "special"}
    return Plan.of(**settings | given)
