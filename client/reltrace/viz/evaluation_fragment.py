"""What a notebook shows of an evaluation: HTML without scripts, in light and in dark."""

from __future__ import annotations

import html

from reltrace.evaluation.evaluation import Evaluation, caption, table, verdict
from reltrace.viz.notebook_html import BOX, GREY

_CELL = "padding:1px 16px 1px 0;border:0;background:none;color:#1a1a1a"


def evaluation_fragment(found: Evaluation) -> str:
    """Return its table, a rule that is the best bold; every colour is set, nothing leaks out."""
    parts = [f'<div style="{BOX}"><div>{html.escape(found.title)}</div>']
    notes = []
    if found.prompts:
        titles, rows = table(found)
        parts.append(
            '<table style="border-collapse:collapse;border:0;margin:6px 0;font-size:13px">'
            + _row("th", titles, bold=False)
            + "".join(_row("td", row, bold=(row[0],) == found.best()) for row in rows)
            + "</table>"
        )
        notes += [caption(found), verdict(found)]
        notes += [f"Warning: {warning}" for warning in found.warnings]
    if found.failures:
        key, error = next(iter(found.failures.items()))
        notes.append(f"{len(found.failures):,} failed; the first, {key}: {error}")
    parts.append(f'<div style="{GREY}">{"<br>".join(map(html.escape, notes))}</div></div>')
    return "".join(parts)


def _row(tag: str, texts: list[str], bold: bool) -> str:
    cells = "".join(
        f'<{tag} style="{_CELL};text-align:{"right" if place else "left"};'
        f'font-weight:{700 if bold else 400}">{html.escape(text)}</{tag}>'
        for place, text in enumerate(texts)
    )
    return f'<tr style="background:none">{cells}</tr>'
