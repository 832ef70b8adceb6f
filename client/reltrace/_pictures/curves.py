"""Perturbation curves as a picture, through matplotlib (the extra ``reltrace[plot]``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reltrace._errors import MissingDependency

if TYPE_CHECKING:
    from reltrace._evaluate.evaluation import Evaluation

_AXES = {
    "embed": "tokens switched off (share)",
    "neuron": "neurons switched off",
}


def write(evaluation: Evaluation, path: Path) -> None:
    """Write the curves of every rule beside the areas between them.

    Raises
    ------
    MissingDependency
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("plots need matplotlib: pip install 'reltrace[plot]'") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = [f"C{number}" for number in range(len(evaluation.rules))]
    for colour, (rule, score) in zip(colours, evaluation.rules.items(), strict=False):
        left.plot(evaluation.at, score.most, color=colour, label=rule)
        left.plot(evaluation.at, score.least, color=colour, linestyle="--")
    if evaluation.site == "neuron":
        left.set_xscale("symlog", linthresh=1)
    left.set_xlabel(_AXES[evaluation.site])
    left.set_ylabel("target (mean over prompts)")
    left.set_title("most relevant first (solid), least relevant first (dashed)", fontsize="medium")
    left.legend(frameon=False)
    names = list(evaluation.rules)
    areas = [evaluation.rules[name].area for name in names]
    right.barh(
        names,
        [found.mean for found in areas],
        xerr=[found.margin for found in areas],
        color=colours,
        capsize=3,
    )
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("area between the curves (95 % interval)")
    right.set_title(f"{evaluation.model}, {evaluation.prompts} prompts", fontsize="medium")
    for axes in (left, right):
        axes.title.set_parse_math(False)
    figure.savefig(path, dpi=150)
