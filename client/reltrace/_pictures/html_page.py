"""The heatmap as one self-contained page."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from reltrace._pictures.display import NEGATIVE, POSITIVE, ZERO, readable_all, token_values
from reltrace._pictures.heatmap import heatmap
from reltrace._trace import SITES_WITHOUT_LAYERS, Trace


def write(trace: Trace, path: Path, *, site: str, normalize: bool) -> None:
    """Write the page. It loads nothing, from nowhere: its own policy forbids it.

    Raises
    ------
    InvalidArgument
        If the trace has no value per token.
    """
    path.write_text(page(trace, site=site, normalize=normalize), encoding="utf-8")


def page(trace: Trace, *, site: str, normalize: bool) -> str:
    """Return the page's text."""
    table = heatmap(trace, site, normalize=normalize)
    text = token_values(trace, site)
    provenance = trace.provenance
    versions = ", ".join(f"{name} {number}" for name, number in sorted(provenance.versions.items()))
    about = (
        f"Model {provenance.model}, rule {provenance.rule}, {provenance.dtype} on "
        f"{provenance.device}" + (f"; {versions}" if versions else "")
    )
    data = {
        "tokens": table.tokens,
        "words": readable_all(trace.tokens),
        "columns": table.columns,
        "layered": site not in SITES_WITHOUT_LAYERS,
        "raw": _numbers(table.raw),
        "shown": _numbers(table.shown),
        "limit": table.limit,
        "text": _numbers(text.values),
        "textTitle": text.title,
        "normalized": normalize,
        "colours": {"negative": NEGATIVE, "zero": ZERO, "positive": POSITIVE},
    }
    template = files("reltrace._pictures").joinpath("page.html").read_text(encoding="utf-8")
    values = {
        "TITLE": html.escape(table.title),
        "SUBTITLE": html.escape(table.scale),
        "ABOUT": html.escape(about),
        "DATA": _script_safe(json.dumps(data, ensure_ascii=False, allow_nan=False)),
    }
    # In one pass: what a prompt says is not looked at for further placeholders.
    return re.sub("%%([A-Z]+)%%", lambda match: values[match.group(1)], template)


def _numbers(values: Any) -> Any:
    """Return numbers with 7 significant digits, which is float32's precision; None for NaN."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values]


def _script_safe(text: str) -> str:
    # Inside <script>, "</script>" and "<!--" would end or change the element wherever they stand.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
