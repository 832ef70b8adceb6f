"""Perturbation curves as a picture, through matplotlib (the extra ``reltrace[plot]``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reltrace.evaluation.evaluation import Evaluation
from reltrace.evaluation.scores import on_axis
from reltrace.evaluation.settings import MEASURES
from reltrace.storage.atomic_files import replace_file

_AXES = {
    "embed": "tokens replaced (share)",
    "neuron": "neurons switched off (n is at log(1 + n))",
}


def write_curves(evaluation: Evaluation, path: Path) -> None:
    """Write the curves of every rule beside the areas between them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = [f"C{number}" for number in range(len(evaluation.rules))]
    # The axis on which the area between two curves is computed.
    axis = on_axis(evaluation.site, evaluation.at)
    for colour, (rule, score) in zip(colours, evaluation.rules.items(), strict=True):
        left.plot(axis, score.most, color=colour, label=rule)
        left.plot(axis, score.least, color=colour, linestyle="--")
    if evaluation.site == "neuron":
        numbers = ticks(int(evaluation.at[-1]))
        left.set_xticks(
            on_axis("neuron", np.array(numbers, np.float64)), [f"{n:,}" for n in numbers]
        )
    left.set_xlabel(_AXES[evaluation.site])
    left.set_ylabel(f"{MEASURES[evaluation.measure]} (mean over prompts)")
    left.set_title("most relevant first (solid), least relevant first (dashed)", fontsize="medium")
    left.legend(frameon=False)
    names = list(evaluation.rules)
    areas = [evaluation.rules[name].area for name in names]
    right.barh(
        names,
        [found.mean for found in areas],
        xerr=[found.margin for found in areas] if evaluation.prompts > 1 else None,
        color=colours,
        capsize=3,
    )
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    interval = " (95 % interval)" if evaluation.prompts > 1 else ""
    right.set_xlabel(f"area between the curves{interval}")
    lines = [evaluation.title, *(f"Warning: {warning}" for warning in evaluation.warnings)]
    title = figure.suptitle(
        "\n".join(lines),
        fontsize="medium",
        wrap=True,
        color="tab:red" if evaluation.warnings else "black",
    )
    title.set_parse_math(False)
    with replace_file(path, durable=False) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def ticks(last: int) -> list[int]:
    """Return the numbers that an axis of neurons shows: 0, powers of ten, and its end."""
    powers = [10**power for power in range(10) if 10**power <= last / 2]
    return [0, *powers, last]
