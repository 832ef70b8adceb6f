"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reltrace._evaluate.scores import Floats, Mean


@dataclass(frozen=True, eq=False)
class RuleScore:
    """How one rule did.

    Attributes
    ----------
    area : Mean
        Area between the curves, in units of the target: see `reltrace.Client.evaluate`.
    most, least : ndarray
        float64 [P]: the target, averaged over prompts, as what is most (least) relevant is switched
        off first.
    hit : Mean or None
        Share of prompts whose most relevant token is part of the answer; None without answers.
    mass : Mean or None
        Share of the positive relevance that is on the answer; None without answers.
    """

    area: Mean
    most: Floats
    least: Floats
    hit: Mean | None
    mass: Mean | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found, rule by rule.

    Attributes
    ----------
    model : str
        The model, as it named itself.
    site : str
        What was switched off: "embed" (tokens) or "neuron".
    prompts : int
        How many were evaluated.
    at : ndarray
        float64 [P]: what was switched off at each point: shares of tokens, or numbers of neurons.
    rules : mapping of str to RuleScore
        In the order that was asked for.
    failures : mapping
        Prompts that could not be evaluated, by id, and why.
    """

    model: str
    site: str
    prompts: int
    at: Floats
    rules: Mapping[str, RuleScore]
    failures: Mapping[str | int, Exception]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "model": self.model,
            "site": self.site,
            "prompts": self.prompts,
            "at": self.at.tolist(),
            "rules": {
                rule: {
                    "area": asdict(score.area),
                    "most": score.most.tolist(),
                    "least": score.least.tolist(),
                    "hit": score.hit and asdict(score.hit),
                    "mass": score.mass and asdict(score.mass),
                }
                for rule, score in self.rules.items()
            },
            "failures": {str(key): str(error) for key, error in self.failures.items()},
        }

    def plot(self, path: str | Path) -> None:
        """Draw the curves and the areas between them, as PNG, SVG or PDF.

        Raises
        ------
        MissingDependency
            If matplotlib is not installed.
        """
        from reltrace._pictures.curves import write

        write(self, Path(path))

    def best(self) -> str:
        """Return the rule with the largest area."""
        return max(self.rules, key=lambda rule: np.nan_to_num(self.rules[rule].area.mean, nan=-1e9))
