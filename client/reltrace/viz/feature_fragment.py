"""What a notebook shows of a neuron or head: HTML without scripts, in light and in dark."""

from __future__ import annotations

import html

from reltrace.atlas.examples import Context, Feature
from reltrace.types.token_text import visible_token
from reltrace.viz.display import colour, css, ink
from reltrace.viz.notebook_html import APART, BOX, CELL, GREY

_CONTEXTS = 6
"""Of each sign."""


def feature_fragment(feature: Feature) -> str:
    """Return label, figures and strongest contexts; every colour is set, nothing leaks out."""
    name = f"{feature.site} {feature.index} of layer {feature.layer}"
    called = feature.label or "no token stands out in its contexts"
    figures = (
        f"{feature.count:,} tokens, relevance mass {feature.mass:.4g}, mean activation "
        f"{feature.mean['activation']:.3g}"
    )
    rows = [
        _row(context, feature)
        for sign in "+-"
        for context in feature.contexts[f"relevance{sign}"][:_CONTEXTS]
    ]
    head = "".join(
        f'<th style="{CELL};font-weight:400">{title}</th>'
        for title in ("R", "where it is strong", "target")
    )
    return (
        f'<div style="{BOX}"><div><b style="{APART}">{html.escape(called)}</b> ({name})</div>'
        f'<table style="border-collapse:collapse;border:0;margin:6px 0;font-size:13px">'
        f'<tr style="background:none">{head}</tr>{"".join(rows)}</table>'
        f'<div style="{GREY}">{html.escape(figures)}. Red speaks for what is explained, blue '
        "against it.</div></div>"
    )


def _row(context: Context, feature: Feature) -> str:
    largest = max(abs(c.relevance) for sign in "+-" for c in feature.contexts[f"relevance{sign}"])
    before, token, after = map(html.escape, context.parts())
    share = context.relevance / (largest or 1.0)
    background = colour(share)
    strong = f"background:{css(background)};color:{css(ink(background))};border-radius:3px"
    cells = (
        f"{context.relevance:+.4g}",
        f'{before}<span style="{strong}">{token}</span>{after}',
        html.escape(visible_token(context.target).strip()),
    )
    style = f"{CELL};{APART};white-space:pre-wrap"
    texts = "".join(f'<td style="{style}">{cell}</td>' for cell in cells)
    return f'<tr style="background:none">{texts}</tr>'
