"""The settings of an evaluation: rules, measure, replacement, and points of the curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from reltrace.evaluation.scores import Floats
from reltrace.types.checks import check_name, check_text, whole_number
from reltrace.types.errors import invalid
from reltrace.types.trace import Trace

RANDOM = "random"
SITES = ("embed", "neuron")

Measure: TypeAlias = Literal["logprob", "probability", "logit"]
Keep: TypeAlias = Literal["special", "none"]

MEASURES = {
    "logprob": "log-probability",
    "probability": "probability",
    "logit": "logit",
}
"""What can be measured, and its name in texts."""

_KEEP = ("special", "none")
_MAX_NEURONS = 4096
_MAX_ID = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `Client.evaluate`, which documents them; raises InvalidArgument."""

    rules: Sequence[str]
    site: str
    measure: str
    replace: str | int
    keep: str
    points: int
    seed: int

    def __post_init__(self) -> None:
        rules = self.rules
        if (
            isinstance(rules, str)
            or not isinstance(rules, Sequence)
            or not rules
            or not all(isinstance(rule, str) for rule in rules)
            or len(set(rules)) < len(rules)
        ):
            raise invalid("rules", f"must be names of rules, each once, not {rules!r}")
        if set(rules) == {RANDOM}:
            raise invalid("rules", "needs one beside random, whose traces resolve the target")
        for name, allowed in (("site", SITES), ("measure", MEASURES), ("keep", _KEEP)):
            check_name(getattr(self, name), name, allowed)
        _check_replacement(self.replace, self.site)
        # Of a single step both ends are the same in every order.
        whole_number(self.points, "points", 2, 100)
        whole_number(self.seed, "seed", most=2**63 - 1)

    @property
    def token(self) -> str | int | None:
        """The token that replaces others; None: an embedding does."""
        return None if self.replace in ("zero", "mean") else self.replace

    def at(self, neurons: int) -> Floats:
        """Return how much is switched off at each point: shares of tokens, or numbers of neurons.

        In equal steps on the axis of `scores.on_axis`. Neurons end at half of them: past it both
        orders switch off the same ones, and the curves meet again.
        """
        if self.site == "embed":
            return np.linspace(0.0, 1.0, self.points + 1)
        most = max(1, min(neurons // 2, _MAX_NEURONS))
        return np.unique(np.round(np.expm1(np.linspace(0.0, np.log1p(most), self.points + 1))))

    def kept(self, trace: Trace) -> frozenset[int]:
        """Return the positions of tokens that stay as they are."""
        return frozenset() if self.keep == "none" else frozenset((0, *trace.special_positions))


def _check_replacement(value: Any, site: str) -> None:
    if site == "neuron" and value != "zero":
        raise invalid("replace", f"must be zero where neurons are switched off, not {value!r}")
    if isinstance(value, str):
        check_text(value, "replace")
        if value == "max":
            raise invalid("replace", "a token whose text is max is given by its id")
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise invalid("replace", f"must be zero, mean, or a token's text or id, not {value!r}")
    else:
        whole_number(value, "replace", most=_MAX_ID)
