"""The page of an atlas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reltrace.atlas.atlas import Atlas
from reltrace.atlas.examples import QUANTILES, Context, Feature
from reltrace.types.atlas_shard import LISTS, MEASURES, SITES
from reltrace.types.token_text import token_texts, visible_token
from reltrace.viz.colours import COLOURS
from reltrace.viz.templates import page

_SEARCHED = LISTS[:2]
# Salient tokens that are shown of a neuron or head.
_SALIENT_TOKENS = 8


def atlas_page(atlas: Atlas, *, most: int, contexts: int) -> str:
    """Return the page of an atlas. See `Atlas.save_page`."""
    about, (model, revision) = atlas.about, atlas.about["made_by"]
    texts = _Snippets(next_tokens=about["target"] is None)
    sites = {site: _site(atlas, site, most, contexts, texts) for site in SITES}
    left_out = f", {len(atlas.skipped):,} prompts left out" if atlas.skipped else ""
    data = {
        "subtitle": f"Where {atlas.prompts:,} prompts ({atlas.tokens:,} tokens{left_out}) draw on "
        f"neurons and heads: the token that is strong, and after the arrow what "
        f"{'follows' if about['target'] is None else 'was explained'}.",
        "sites": sites,
        "snippets": texts.snippets,
        "words": list(texts.words),
        "contexts": contexts,
        "colours": COLOURS,
    }
    foot = (
        f"Model {model} at revision {revision}, rule {about['rule']}; explained: "
        f"{_explained(about)}. "
        "Relevance is R = x · dL/dx, the backward pass starting at 1; relevance mass is the sum of "
        "|R| over all tokens that are counted. The activation of a head is the length of what it "
        "writes. Words that stand out: by log-odds against the corpus."
    )
    return page("atlas", title=f"Atlas of {model}", about=foot, data=data)


def _explained(about: Mapping[str, Any]) -> str:
    """Say what the prompts explain."""
    target, positions, seed = about["target"], about["positions"], about["seed"]
    if target is not None:
        # 4, the id, is not the token "4".
        return f"target {target if isinstance(target, str) else f'token id {target}'}"
    drawn = "all positions" if positions is None else f"{positions} positions (seed {seed})"
    return f"the next tokens at {drawn} of each prompt"


def _site(atlas: Atlas, site: str, most: int, contexts: int, texts: _Snippets) -> dict[str, Any]:
    mass = atlas.mass(site)
    return {
        "layers": mass.shape[0],
        "width": mass.shape[1],
        "mass": float(mass.sum()) or 1.0,
        "features": [
            _feature(atlas, feature, contexts, texts) for feature in atlas.by_mass(site, most)
        ],
    }


def _feature(atlas: Atlas, feature: Feature, contexts: int, texts: _Snippets) -> list[Any]:
    """Return the fields of a neuron or head in the order in which the script reads them."""
    return [
        feature.layer,
        feature.index,
        feature.label,
        feature.labelled_by,
        _short(feature.mass),
        [_number(feature.mean[measure]) for measure in MEASURES],
        [
            [_number(feature.quantile(share, measure)) for share in QUANTILES]
            for measure in MEASURES
        ],
        [
            [visible_token(one.token).strip(), one.role, one.count, one.of]
            for one in feature.salient_tokens[:_SALIENT_TOKENS]
        ],
        [[texts.place(one) for one in _listed(feature, name, contexts)] for name in LISTS],
        [feature.contexts.sizes[name] for name in LISTS],
    ]


def _listed(feature: Feature, name: str, count: int) -> Sequence[Context]:
    # All contexts of the lists that are searched: the page counts as `Atlas.find` does.
    return feature.contexts[name] if name in _SEARCHED else feature.contexts.first(name, count)


def _short(value: float, digits: int = 5) -> float:
    """Return a number with as many digits as are shown: all digits would double the page."""
    return float(f"{value:.{digits}g}")


def _number(value: float) -> float | None:
    return _short(value) if value == value else None


class _Snippets:
    """The texts of contexts and their words, each stored once."""

    def __init__(self, *, next_tokens: bool) -> None:
        self._next_tokens = next_tokens
        self.snippets: list[list[Any]] = []
        self.words: dict[str, int] = {}
        self._numbers: dict[tuple[int, int, int], int] = {}

    def place(self, context: Context) -> tuple[float, float, int, int]:
        """Return relevance, activation, number of the snippet, and index of the word in it."""
        window = context.window
        key = (context.prompt, window.start, window.stop)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.snippets)
            words = token_texts(context.tokens, slice(window.start, window.stop))
            self.snippets.append(
                [
                    [self.words.setdefault(one.shown, len(self.words)) for one in words],
                    None if self._next_tokens else visible_token(context.target).strip(),
                    context.prompt,
                    int(window.start > 0),
                    int(window.stop < len(context.tokens)),
                    # Words that are only the number of a part of a character: not searched.
                    [at for at, one in enumerate(words) if one.number > 1],
                ]
            )
        # Search results are sorted by sums of relevance: all digits of a float32.
        values = _short(context.relevance, 8), _short(context.activation)
        return *values, number, context.position - window.start
