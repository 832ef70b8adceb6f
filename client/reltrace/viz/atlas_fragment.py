"""What a notebook shows of an atlas: HTML without scripts, in light and in dark."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from reltrace.viz.notebook_html import APART, BOX, CELL, GREY

if TYPE_CHECKING:
    from reltrace.atlas.atlas import Atlas

_NEURONS = 8
"""Those with most relevance."""


def atlas_fragment(atlas: Atlas) -> str:
    """Return what it is of, and its strongest neurons; every colour is set, nothing leaks out."""
    model, revision = atlas.about["made_by"]
    left_out = f", {len(atlas.skipped):,} prompts left out" if atlas.skipped else ""
    figures = (
        f"{atlas.prompts:,} prompts, {atlas.tokens:,} tokens{left_out}; {atlas.layers} layers of "
        f"{atlas.features():,} neurons and {atlas.features('head'):,} heads"
    )
    rows = [("layer", "neuron", "relevance mass", "label")]
    rows += [
        (str(one.layer), str(one.index), f"{one.mass:.4g}", one.label or "–")
        for one in atlas.by_mass(most=_NEURONS)
    ]
    table = "".join(
        '<tr style="background:none">'
        + "".join(
            f'<td style="{CELL};{APART};white-space:pre">{html.escape(cell)}</td>' for cell in row
        )
        + "</tr>"
        for row in rows
    )
    origin = html.escape(f"revision {revision}, rule {atlas.about['rule']}")
    return (
        f'<div style="{BOX}"><div>Atlas of <b>{html.escape(model)}</b>: {figures}</div>'
        f'<table style="border-collapse:collapse;border:0;margin:6px 0;font-size:13px">{table}'
        f'</table><div style="{GREY}">{origin}; the neurons with most relevance</div></div>'
    )
