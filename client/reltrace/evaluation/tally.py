"""Adds up the curves of prompts: scores by rule, and warnings if these can not be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reltrace.evaluation.curves import Curves
from reltrace.evaluation.evaluation import Evaluation, RuleScore
from reltrace.evaluation.scores import Floats, Mean, area, on_axis
from reltrace.evaluation.settings import MEASURES, RANDOM, Settings


class Tally:
    """Sums over the prompts that have been measured."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._areas: dict[str, list[float]] = {rule: [] for rule in settings.rules}
        self._sums: dict[tuple[str, bool], Floats] = {}
        self._located: dict[str, list[tuple[float, float]]] = {rule: [] for rule in settings.rules}
        # Per prompt, the change of the target: along curves of the random order (or of all rules,
        # if there is none) on average and at their end, and without the answer.
        self._rise: list[float] = []
        self._rise_at_end: list[float] = []
        self._without_answer: list[float] = []
        self._answers_kept = 0
        self._count = 0
        self._model = ""
        self._at: Floats = np.zeros(0)

    def add(self, curves: Curves) -> None:
        """Add a prompt, all of whose curves are measured."""
        rules = self._settings.rules
        self._count += 1
        self._at, self._model = curves.at, curves.trace.provenance.model
        axis = on_axis(self._settings.site, curves.at)
        found = {(rule, most): curves.curve(rule, most) for rule in rules for most in (True, False)}
        for key, values in found.items():
            self._sums[key] = self._sums.get(key, np.zeros(len(values))) + values
        for rule in rules:
            self._areas[rule].append(area(found[rule, True], found[rule, False], axis))
        for rule, located in curves.located.items():
            self._located[rule].append(located)
        start = curves.values[()]
        undirected = [RANDOM] if RANDOM in rules else rules
        mean = np.mean([found[rule, most] for rule in undirected for most in (True, False)], axis=0)
        self._rise.append(float(np.trapezoid(mean - start, axis)))
        self._rise_at_end.append(float(mean[-1] - start))
        if off := curves.without_answer:
            self._without_answer.append(curves.values[off] - start)
        if curves.answer is not None and len(off) < len(curves.answer):
            self._answers_kept += 1

    def evaluation(
        self, replace: tuple[str, int | None], failures: Mapping[str | int, Exception]
    ) -> Evaluation:
        """Return the result; `replace` is what replaced tokens, and its id if it is a token."""
        return Evaluation(
            model=self._model,
            site=self._settings.site,
            measure=self._settings.measure,
            replace=replace[0],
            replace_id=replace[1],
            keep=self._settings.keep,
            prompts=self._count,
            at=self._at,
            rules={rule: self._score(rule) for rule in self._settings.rules},
            warnings=tuple(self._warnings()),
            failures=failures,
        )

    def _score(self, rule: str) -> RuleScore:
        most, least = (
            self._sums[rule, first] / self._count if self._count else np.zeros(0)
            for first in (True, False)
        )
        located = self._located[rule]
        return RuleScore(
            area=Mean.of(self._areas[rule]),
            areas=np.array(self._areas[rule]),
            most=most,
            least=least,
            hit=Mean.of([hit for hit, _ in located]) if located else None,
            mass=Mean.of([mass for _, mass in located]) if located else None,
        )

    def _warnings(self) -> list[str]:
        if not self._count:
            return []
        found = []
        off = "tokens" if self._settings.site == "embed" else "neurons"
        measure = MEASURES[self._settings.measure]
        rises = {
            "on the average of the curves": Mean.of(self._rise),
            "at their end": Mean.of(self._rise_at_end),
        }
        # The margin is nan for a single prompt.
        if risen := [
            f"{rise} {where}"
            for where, rise in rises.items()
            if rise.mean - np.nan_to_num(rise.margin) > 0
        ]:
            found.append(
                f"the {measure} of the target rises as {off} are switched off, in any order "
                f"({' and '.join(risen)}): the areas say little about the rules"
            )
        answer = Mean.of(self._without_answer)
        if answer.count and not answer.mean + np.nan_to_num(answer.margin) < 0:
            found.append(
                f"without the tokens of the known answer the {measure} of the target does not "
                f"clearly fall ({answer}): the areas say little about the rules"
            )
        if self._answers_kept:
            found.append(
                f"of {self._answers_kept:,} of {self._count:,} prompts the answer has tokens that "
                'are kept: put a text before it, or keep "none"'
            )
        return found
