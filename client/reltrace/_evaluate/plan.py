"""What is asked of an evaluation: rules, and where the points of its curves are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reltrace._checks import whole_number
from reltrace._errors import invalid
from reltrace._evaluate.scores import Floats, shares

RANDOM = "random"
SITES = ("embed", "neuron")

_MOST_NEURONS = 4096


@dataclass(frozen=True, slots=True)
class Plan:
    """What is evaluated, and how.

    Attributes
    ----------
    rules : tuple of str
        Of traces; "random" is an order without a trace.
    site : str
        "embed": tokens are switched off; "neuron": neurons, at all tokens.
    points : int
        Steps of a curve.
    seed : int
        Of random orders.
    """

    rules: tuple[str, ...]
    site: str
    points: int
    seed: int

    @classmethod
    def of(cls, rules: Any, site: object, points: object, seed: object) -> Plan:
        """Check the arguments of `evaluate`.

        Raises
        ------
        InvalidArgument
            Names the one that is wrong.
        """
        if (
            isinstance(rules, str)
            or not isinstance(rules, Sequence)
            or not rules
            or not all(isinstance(rule, str) for rule in rules)
            or len(set(rules)) < len(rules)
        ):
            raise invalid("rules", f"must be names of rules, each once, not {rules!r}")
        if set(rules) == {RANDOM}:
            raise invalid("rules", "needs one beside random, whose traces name the target")
        if not isinstance(site, str) or site not in SITES:
            raise invalid("site", f"must be one of {', '.join(SITES)}, not {site!r}")
        return cls(
            tuple(rules),
            site,
            # With a single step both orders switch off nothing, or everything.
            whole_number(points, "points", 2, 100),
            whole_number(seed, "seed", most=2**63 - 1),
        )

    def at(self, neurons: int) -> Floats:
        """Return what is switched off at each point: shares of tokens, or numbers of neurons.

        Points are equal steps on the axis that is drawn: see `scores.on_axis`. Neurons end at half
        of them, for past it both orders switch off the same ones, and the curves meet again.
        """
        if self.site == "embed":
            return shares(self.points)
        most = max(1, min(neurons // 2, _MOST_NEURONS))
        return np.unique(np.round(np.expm1(np.linspace(0.0, np.log1p(most), self.points + 1))))
