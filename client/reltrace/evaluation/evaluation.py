"""The result of an evaluation, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reltrace.evaluation.scores import Floats, Mean
from reltrace.evaluation.settings import MEASURES
from reltrace.types.errors import invalid


@dataclass(frozen=True, eq=False, repr=False)
class RuleScore:
    """The score of one rule.

    Attributes
    ----------
    area : Mean
        Area between the curves, in units of the measure: see `reltrace.Client.evaluate`.
    areas : ndarray
        float64 [prompts]: of each evaluated prompt, in their order.
    most, least : ndarray
        float64 [P]: the measured values, averaged over prompts, with the most (least) relevant
        tokens or neurons switched off first.
    hit : Mean or None
        Share of prompts whose most relevant token is part of the answer; None without answers.
    mass : Mean or None
        Share of the positive relevance that is on the answer; None without answers.
    """

    area: Mean
    areas: Floats
    most: Floats
    least: Floats
    hit: Mean | None
    mass: Mean | None

    def __repr__(self) -> str:
        located = "" if self.hit is None else f", hit {self.hit}, mass {self.mass}"
        return f"RuleScore(area {self.area}{located}, curves of {len(self.most)} points)"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of an evaluation, by rule.

    Attributes
    ----------
    model : str
        Name of the model; "" if no prompt could be evaluated.
    site : str
        What was switched off: "embed" (tokens) or "neuron".
    measure : str
        What was measured of the target: "logprob", "probability" or "logit".
    replace : str
        What replaced tokens: "zero", "mean", or a token as the model writes it.
    replace_id : int or None
        Id of that token.
    keep : str
        Which tokens were not replaced: "special" ones, with the first, or "none".
    prompts : int
        Number of evaluated prompts.
    at : ndarray
        float64 [P]: how much was switched off at each point: shares of tokens, or numbers of
        neurons.
    rules : mapping of str to RuleScore
        In the order of the call.
    warnings : tuple of str
        Why the areas can not be trusted: the target rises as tokens are replaced, or does not fall
        without the known answer. Empty if they can.
    failures : mapping
        Prompts that could not be evaluated, by id, and why.
    """

    model: str
    site: str
    measure: str
    replace: str
    replace_id: int | None
    keep: str
    prompts: int
    at: Floats
    rules: Mapping[str, RuleScore]
    warnings: tuple[str, ...]
    failures: Mapping[str | int, Exception]

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        areas = ", ".join(f"{rule} {score.area}" for rule, score in self.rules.items())
        warned = "".join(f"; warning: {warning}" for warning in self.warnings)
        area = f"; area {areas}" if self.prompts else ""
        return f"Evaluation({self.title}{failed}{area}{warned})"

    def _repr_html_(self) -> str:
        from reltrace.viz.notebook import evaluation_html

        return evaluation_html(self)

    @property
    def title(self) -> str:
        """The model, how many prompts, and what was done, as tables and pictures say it."""
        count = f"{self.prompts:,} prompt{'' if self.prompts == 1 else 's'}"
        if self.site == "neuron":
            done = "neurons set to 0"
        elif self.replace_id is not None:
            done = f"tokens replaced by {self.replace!r}"
        else:
            done = f"tokens set to {'0' if self.replace == 'zero' else 'the mean embedding'}"
        # Without any evaluated prompt, the name of the model is not known.
        return f"{self.model and f'{self.model}: '}{count}, {done}, by {MEASURES[self.measure]}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain lists and numbers, ready for `json.dumps`.

        None is what there is no number for: the margin of a single prompt, means of none.
        """
        scalars = ("model", "site", "measure", "replace", "replace_id", "keep", "prompts")
        return {
            **{name: getattr(self, name) for name in scalars},
            "at": self.at.tolist(),
            "rules": {
                rule: {
                    "area": _plain(score.area),
                    "most": score.most.tolist(),
                    "least": score.least.tolist(),
                    "hit": score.hit and _plain(score.hit),
                    "mass": score.mass and _plain(score.mass),
                }
                for rule, score in self.rules.items()
            },
            "best": list(self.best()) if self.prompts else [],
            "warnings": list(self.warnings),
            "failures": {str(key): str(error) for key, error in self.failures.items()},
        }

    def plot(self, path: str | Path) -> None:
        """Draw the curves and the areas between them, as PNG, SVG or PDF.

        Raises
        ------
        InvalidArgument
            If the path ends in something else or its folder is not there, or no prompt could be
            evaluated.
        MissingDependency
            If matplotlib is not installed.
        """
        from reltrace.viz.curves import write_curves
        from reltrace.viz.files import check_path

        path = check_path(path, pages=False)
        self._check_prompts()
        write_curves(self, path)

    def best(self) -> tuple[str, ...]:
        """Return the rule with the largest area, and those that do not clearly differ from it.

        Prompt by prompt, the area of a rule is subtracted from that of the largest; where the 95 %
        interval of the mean difference has 0 in it, they do not clearly differ. (A single prompt
        has no interval.)

        Returns
        -------
        tuple of str
            One name: that rule is the best. Several: none of them is, on these prompts.

        Raises
        ------
        InvalidArgument
            If no prompt could be evaluated; the message says why.
        """
        self._check_prompts()
        first = max(self.rules, key=lambda rule: self.rules[rule].area.mean)
        more = {
            rule: Mean.of(self.rules[first].areas - score.areas)
            for rule, score in self.rules.items()
        }
        return tuple(
            # The margin may be nan.
            rule
            for rule, mean in more.items()
            if rule == first or not mean.mean - mean.margin > 0
        )

    def _check_prompts(self) -> None:
        if self.prompts:
            return
        why = next((f": {key}: {error}" for key, error in self.failures.items()), "")
        raise invalid("prompts", f"none of {len(self.failures)} could be evaluated{why}")


def _plain(mean: Mean) -> dict[str, Any]:
    return {name: None if np.isnan(number) else number for name, number in asdict(mean).items()}


def table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Return titles, and a row for each rule, whose first cell is its name."""
    titles = ["rule", "area between curves"]
    located = any(score.hit for score in found.rules.values())
    if located:
        titles += ["answer is strongest", "positive relevance on it"]
    rows = []
    for rule, score in found.rules.items():
        means = [score.area, score.hit, score.mass] if located else [score.area]
        rows.append([rule, *map(str, means)])
    return titles, rows


def caption(found: Evaluation) -> str:
    """Return how the numbers are to be read."""
    if found.prompts == 1:
        return "one prompt: no interval"
    return "mean ± half of the 95 % interval"


def verdict(found: Evaluation) -> str:
    """Return which rule is best, or that none is."""
    best = found.best()
    if len(best) == 1:
        return f"best: {best[0]}, whose area is larger prompt by prompt (95 % interval)"
    return f"no rule is best: {', '.join(best)} can not be told apart on these prompts"
