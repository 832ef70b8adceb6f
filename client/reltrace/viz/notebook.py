"""What a notebook shows of results."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from reltrace.atlas.atlas import Atlas
from reltrace.atlas.examples import Context, Feature
from reltrace.evaluation.evaluation import Evaluation, caption, table, verdict
from reltrace.types.arrays import SITES_WITHOUT_LAYERS
from reltrace.types.generation import Generation
from reltrace.types.token_text import readable_all, visible_token
from reltrace.types.top_entries import Entry
from reltrace.types.trace import Trace
from reltrace.viz.colours import colour, css, layer_numbers, scaled, text_colour, token_values
from reltrace.viz.templates import template
from reltrace.viz.words import Words, describe_target, entry_table, next_tokens, segments

# A notebook keeps what it shows: of a long prompt, this many tokens at either end.
_END_TOKENS = 300
# A larger heatmap is of no use in a notebook: `Trace.plot` writes one.
_MAP_TOKENS, _MAP_LAYERS = 80, 80
_STRONGEST = 10
_ATLAS_NEURONS = 8
_CONTEXTS_PER_SIGN = 6


def _html(macro: str, *arguments: object) -> str:
    return str(getattr(template("notebook.html").module, macro)(*arguments))


def _shade(share: float) -> str:
    """Return the style of a text on the colour of a value from -1 to 1."""
    background = colour(share)
    return f"background:{css(background)};color:{css(text_colour(background))}"


def trace_html(trace: Trace) -> str:
    """Return the target, and the coloured tokens with a heatmap or the strongest entries."""
    if not trace.arrays:
        content = Markup("<div>No site was asked for: there are no tensors.</div>")
    elif trace.provenance.reduction in ("feature", "topk"):
        content = _entries(trace.top(_STRONGEST), Words.of(trace).names)
    else:
        content = _text(trace) + _heatmap(trace)
    shapes = ", ".join(
        f"{site}{f'/{part}' if part else ''} {list(array.shape)}"
        for site, arrays in trace.arrays.items()
        for part, array in arrays.items()
    )
    origin = (
        f"{shapes or 'no tensors'}; model {trace.provenance.model}, rule {trace.provenance.rule}"
    )
    return _html("trace", describe_target(trace), next_tokens(trace), trace.hints, content, origin)


def _text(trace: Trace) -> Markup:
    shown, words = token_values(trace), Words.of(trace)
    shares = scaled(shown.values)
    count = len(words.texts)
    turns = []
    for segment in segments(trace):
        spans = []
        for position in range(segment.first, segment.stop):
            if _END_TOKENS <= position < count - _END_TOKENS:
                if position == _END_TOKENS:
                    spans.append((f" … {count - 2 * _END_TOKENS} tokens … ", "", ""))
                continue
            style = _shade(float(shares[position])) + ";font-size:10px" * words.special[position]
            title = f"{position}: {shown.values[position]:+.4g}"
            spans.append((words.texts[position], title, style))
        turns.append((segment.role if spans else "", spans))
    return Markup(_html("text", turns, shown.title))


def _heatmap(trace: Trace) -> Markup:
    """Return tokens by layers as a table of colours, if it is small enough to read."""
    site = "resid" if "resid" in trace.sites else trace.sites[0]
    if site in SITES_WITHOUT_LAYERS:
        return Markup("")
    values = trace.by_token(site).astype(np.float32)
    layers, tokens = values.shape
    if tokens > _MAP_TOKENS or layers > _MAP_LAYERS:
        text = '<div style="color:#666">{} layers × {} tokens: {} shows them.</div>'
        return Markup(text).format(layers, tokens, 'trace.plot("trace.html")')
    numbers = layer_numbers(trace, layers)
    shares = np.stack([scaled(layer) for layer in values])
    rows = [
        (
            name,
            [
                (css(colour(float(share))), f"layer {number}: {value:+.4g}")
                for number, value, share in zip(numbers, values[:, at], shares[:, at], strict=True)
            ],
        )
        for at, name in enumerate(Words.of(trace).names)
    ]
    return Markup(_html("heatmap", site, numbers, rows))


def _entries(entries: list[Entry], names: list[str]) -> Markup:
    titles, rows = entry_table(entries, names)
    return Markup(_html("entries", entries[0].site if entries else "", titles, rows))


def generation_html(found: Generation) -> str:
    """Return the prompt and the text, beside that without steering."""
    texts = [("", found)]
    if found.unsteered is not None:
        texts = [("as it is", found.unsteered), ("steered", found)]
    prompt = found.prompt_text or "".join(readable_all(found.prompt_tokens))
    return _html("generation", prompt, texts, found.hints, found.provenance.model)


def evaluation_html(found: Evaluation) -> str:
    """Return the table of an evaluation, the best rule in bold."""
    titles, rows = table(found)
    best = found.best() if found.prompts else ()
    notes = []
    if found.prompts:
        warnings = [f"Warning: {warning}" for warning in found.warnings]
        notes = [caption(found), verdict(found), *warnings]
    if found.failures:
        key, error = next(iter(found.failures.items()))
        notes.append(f"{len(found.failures):,} failed; the first, {key}: {error}")
    bold = best[0] if len(best) == 1 else ""
    return _html("evaluation", found.title, titles, rows if found.prompts else [], bold, notes)


def atlas_html(atlas: Atlas) -> str:
    """Return the model and corpus of an atlas, and its neurons with most relevance."""
    model, revision = atlas.about["made_by"]
    left_out = f", {len(atlas.skipped):,} prompts left out" if atlas.skipped else ""
    figures = (
        f"{atlas.prompts:,} prompts, {atlas.tokens:,} tokens{left_out}; {atlas.layers} layers of "
        f"{atlas.features():,} neurons and {atlas.features('head'):,} heads"
    )
    rows = [
        (one.layer, one.index, f"{one.mass:.4g}", one.label or "–")
        for one in atlas.by_mass(most=_ATLAS_NEURONS)
    ]
    return _html("atlas", model, figures, rows, f"revision {revision}, rule {atlas.about['rule']}")


def feature_html(feature: Feature) -> str:
    """Return the label, figures and strongest contexts of a neuron or head."""
    contexts = [feature.contexts[f"relevance{sign}"] for sign in "+-"]
    largest = max((abs(one.relevance) for found in contexts for one in found), default=0) or 1.0
    rows = [
        (
            f"{one.relevance:+.4g}",
            _context(one, one.relevance / largest),
            visible_token(one.target).strip(),
        )
        for found in contexts
        for one in found[:_CONTEXTS_PER_SIGN]
    ]
    return _html(
        "feature",
        feature.label or "no token stands out in its contexts",
        f"{feature.site} {feature.index} of layer {feature.layer}",
        rows,
        f"{feature.count:,} tokens, relevance mass {feature.mass:.4g}, mean activation "
        f"{feature.mean['activation']:.3g}",
    )


def _context(context: Context, share: float) -> Markup:
    before, token, after = context.parts()
    text = Markup('{}<span style="{};border-radius:3px">{}</span>{}')
    return text.format(before, _shade(share), token, after)
