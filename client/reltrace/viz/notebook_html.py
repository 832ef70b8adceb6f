"""What a notebook shows of a trace: HTML without scripts, in light and in dark surroundings."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reltrace.types.arrays import SITES_WITHOUT_LAYERS
from reltrace.types.top_entries import Entry
from reltrace.types.trace import Trace
from reltrace.viz.display import (
    colour,
    css,
    ink,
    layer_numbers,
    scaled,
    token_values,
)
from reltrace.viz.heatmap import describe_target
from reltrace.viz.words import Words, next_tokens, segments

# Of a long prompt, this many tokens at either end; a notebook keeps what it shows.
_END_TOKENS = 300
# Past these a heatmap is no help in a notebook: `Trace.plot` writes one.
_MAP_TOKENS, _MAP_LAYERS = 80, 80
_STRONGEST = 10

BOX = (
    "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5;color:#1a1a1a;"
    "background:#fff;padding:10px 12px;border:1px solid #ddd;border-radius:4px"
)
APART = "unicode-bidi:plaintext"
"""Of what is written from the right to the left: in its direction, and nothing around it turns."""

HINT = "color:#7a4b00"
GREY = "color:#666;font-size:11px"
CELL = "padding:1px 12px 1px 0;text-align:left;border:0;background:none;color:#1a1a1a"


def trace_fragment(trace: Trace) -> str:
    """Return the target, the coloured tokens, a small heatmap or the strongest entries.

    Every colour is set, so that it reads the same in a dark notebook; nothing leaks out of it.
    """
    target = html.escape(describe_target(trace))
    parts = [f'<div style="{BOX}"><div>Relevance of <b style="{APART}">{target}</b></div>']
    if likeliest := next_tokens(trace):
        parts.append(f'<div style="{GREY}">Likeliest next: {html.escape(likeliest)}</div>')
    parts += [f'<div style="{HINT}">{html.escape(hint)}</div>' for hint in trace.hints]
    if not trace.arrays:
        parts.append("<div>No site was asked for: there are no tensors.</div>")
    elif trace.provenance.reduction in ("feature", "topk"):
        parts.append(_entries(trace.top(_STRONGEST), Words.of(trace).names))
    else:
        parts.append(_text(trace))
        parts.append(_map(trace))
    shapes = html.escape(", ".join(_shapes(trace)) or "no tensors")
    origin = html.escape(f"{trace.provenance.model}, rule {trace.provenance.rule}")
    parts.append(f'<div style="{GREY}">{shapes}; model {origin}</div></div>')
    return "".join(parts)


def _shapes(trace: Trace) -> Sequence[str]:
    return [
        f"{site}{f'/{part}' if part else ''} {list(array.shape)}"
        for site, arrays in trace.arrays.items()
        for part, array in arrays.items()
    ]


def _text(trace: Trace) -> str:
    shown, words = token_values(trace), Words.of(trace)
    shares = scaled(shown.values)
    count = len(words.texts)
    parts = []
    for segment in segments(trace):
        spans = []
        for position in range(segment.first, segment.stop):
            if _END_TOKENS <= position < count - _END_TOKENS:
                if position == _END_TOKENS:
                    spans.append(f"<i> … {count - 2 * _END_TOKENS} tokens … </i>")
                continue
            background = colour(float(shares[position]))
            style = f"background:{css(background)};color:{css(ink(background))};border-radius:3px"
            if words.special[position]:
                style += ";font-size:10px"
            title = html.escape(f"{position}: {shown.values[position]:+.4g}", quote=True)
            word = html.escape(words.texts[position])
            spans.append(f'<span style="{style}" title="{title}">{word}</span>')
        parts.append(_turn(segment.role, "".join(spans)) if trace.turns else "".join(spans))
    return (
        '<div style="margin:6px 0 2px;font-size:15px;line-height:1.9;white-space:pre-wrap;'
        f'overflow-wrap:anywhere">{"".join(parts)}</div>'
        f'<div style="{GREY}">Text coloured by {html.escape(shown.title)}; '
        "red speaks for the target, blue against it.</div>"
    )


def _turn(role: str, spans: str) -> str:
    """Return a turn of a conversation, or what the chat template puts around it, as a block."""
    if not role or not spans:
        return f"<div>{spans}</div>"
    name = f'<b style="font-size:11px;color:#444;margin-right:8px">{html.escape(role)}</b>'
    return f'<div style="border-left:3px solid #888;padding-left:8px">{name}{spans}</div>'


def _map(trace: Trace) -> str:
    """Return tokens by layers as a table of colours, if it is small enough to read."""
    site = "resid" if "resid" in trace.sites else trace.sites[0]
    if site in SITES_WITHOUT_LAYERS:
        return ""
    values = trace.by_token(site).astype(np.float32)
    layers, tokens = values.shape
    if tokens > _MAP_TOKENS or layers > _MAP_LAYERS:
        return (
            f'<div style="color:#666">{layers} layers × {tokens} tokens: '
            "trace.plot(&quot;trace.html&quot;) shows them.</div>"
        )
    numbers = layer_numbers(trace, layers)
    names = Words.of(trace).names
    head = "".join(f'<th style="{_TH}">{number}</th>' for number in numbers)
    rows = [
        _row(names[token], numbers, values[:, token], shares[:, token])
        for shares in [np.stack([scaled(layer) for layer in values])]
        for token in range(tokens)
    ]
    return (
        '<details style="margin:6px 0"><summary style="cursor:pointer">Layers by tokens '
        f"(site {site}, each layer divided by its largest |R|)</summary>"
        '<table style="border-collapse:collapse;border:0;margin:4px 0">'
        f'<tr style="background:none"><th style="{_TH}"></th>{head}</tr>{"".join(rows)}</table>'
        "</details>"
    )


_TH = "padding:0 3px;font-weight:400;font-size:11px;color:#444;border:0;background:none"


def _row(
    name: str,
    numbers: Sequence[int],
    values: NDArray[np.float32],
    shares: NDArray[np.float32],
) -> str:
    cells = "".join(
        f'<td style="width:18px;height:14px;padding:0;border:0;background:{css(colour(share))}"'
        f' title="layer {number}: {value:+.4g}"></td>'
        for number, value, share in zip(numbers, values, shares.tolist(), strict=True)
    )
    style = f"{_TH};text-align:right;white-space:pre;max-width:160px;overflow:hidden"
    return f'<tr style="background:none"><th style="{style}">{html.escape(name)}</th>{cells}</tr>'


def _entries(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Return a table of single values; the tokens by their names."""
    fields = [
        name
        for name in ("layer", "position", "token", "feature")
        if entries and getattr(entries[0], name) is not None
    ]
    style = "padding:1px 12px 1px 0;text-align:left;border:0;background:none;color:#1a1a1a"
    head = "".join(f'<th style="{style};font-weight:400">{name}</th>' for name in [*fields, "R"])
    rows = []
    for entry in entries:
        cells = [
            str(getattr(entry, name)) if at is None or name != "token" else names[at]
            for name in fields
            for at in [entry.position]
        ]
        texts = "".join(
            f'<td style="{style};white-space:pre">{html.escape(cell)}</td>'
            for cell in [*cells, f"{entry.value:+.4g}"]
        )
        rows.append(f'<tr style="background:none">{texts}</tr>')
    site = html.escape(entries[0].site) if entries else ""
    return (
        f'<div style="color:#666;margin-top:4px">Strongest entries of site {site}</div>'
        '<table style="border-collapse:collapse;border:0;margin:4px 0;font-size:13px">'
        f"<tr>{head}</tr>{''.join(rows)}</table>"
    )
