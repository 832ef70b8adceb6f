"""The table of an evaluation, for terminals and notebooks."""

from __future__ import annotations

from reltrace.evaluation.evaluation import Evaluation


def table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows, a row for each rule, which it begins with."""
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
