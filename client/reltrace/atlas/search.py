"""Finds neurons and heads by a text in their contexts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from reltrace.atlas.corpus import Corpus
from reltrace.atlas.examples import BEFORE, Context
from reltrace.atlas.state import State
from reltrace.types.arrays import Array
from reltrace.types.atlas_shard import LISTS
from reltrace.types.token_text import is_partial_character, join_partial_characters, printable

_TOKEN_BITS = 16


@dataclass(frozen=True, slots=True)
class FeatureMatch:
    """A neuron or head whose contexts have a text.

    Attributes
    ----------
    site : str
        "neuron" or "head".
    layer, index : int
        Decoder layer, and index in it.
    label : str
        Its label; "" if it has none.
    contexts : str
        The list of contexts: "relevance+", ...
    count, of : int
        Number of contexts in the list that have the text, and of all.
    strength : float
        Sum of their values.
    strongest : Context or None
        The strongest of them; None if only the label has the text.
    """

    site: str
    layer: int
    index: int
    label: str
    contexts: str
    count: int
    of: int
    strength: float
    strongest: Context | None


@dataclass(frozen=True, slots=True)
class Hits:
    """The contexts that have a text, of one list, for all features of a site."""

    name: str  # of the list
    counts: Array  # int64 [L, F]: number of contexts that have it
    of: Array  # int64 [L, F]: number of all
    strength: Array  # float64 [L, F]: sum of their values
    first: Array  # int64 [L, F]: index in the list of the strongest


def ranked(
    lists: Sequence[Hits], labelled: Iterable[tuple[int, int]], k: int
) -> Iterator[tuple[int, int, Hits]]:
    """Yield up to k features that have a text: layer, index, and the list that has it more often.

    The `labelled` ones, whose label has it, come first.
    """
    counts = np.stack([hits.counts for hits in lists])
    strength = np.stack([hits.strength for hits in lists])
    best = np.lexsort((strength, counts), axis=0)[-1]
    named = np.zeros(best.shape, bool)
    for layer, index in labelled:
        named[layer, index] = True
    counts, strength = (np.take_along_axis(a, best[None], 0)[0] for a in (counts, strength))
    order = np.lexsort((-strength.ravel(), -counts.ravel(), ~named.ravel()))[:k]
    for layer, index in zip(*np.unravel_index(order, best.shape), strict=True):
        if not (counts[layer, index] or named[layer, index]):
            return
        yield int(layer), int(index), lists[best[layer, index]]


class Search:
    """Where a text occurs in the prompts of the features' contexts.

    However it is capitalised; it may run over several tokens and have white space of any kind.
    """

    def __init__(self, corpus: Corpus, state: State, text: str) -> None:
        self._state = state
        named = np.unique(np.concatenate([m.prompts.ravel() for m in state.sites.values()]))
        wanted, texts = folded(text), corpus.folded
        explained = {token for token, shown in texts.items() if wanted in shown}
        # In prompts with such tokens, characters that several tokens share are joined first.
        parts = {token for token, text in state.vocabulary.items() if is_partial_character(text)}
        # Of tokens: prompt and position in one number.
        starts: list[int] = []
        # Of tokens whose next token has the text, or of prompts whose explained token has it.
        targets: list[int] = []
        for prompt, ids, target in corpus.prompts(named[named >= 0]):
            first = prompt << _TOKEN_BITS
            if parts.isdisjoint(ids):
                shown = [texts[token] for token in ids]
            else:
                shown = [
                    one.text.casefold() if one.number == 1 else ""
                    for one in join_partial_characters([state.vocabulary[token] for token in ids])
                ]
            starts += [first + at for at in starts_of(wanted, shown)]
            if state.next_tokens:
                targets += [first + at for at, token in enumerate(ids[1:]) if token in explained]
            elif target in explained:
                targets.append(first)
        self._starts, self._targets = np.array(starts, np.int64), np.array(targets, np.int64)

    def hits(self, site: str, which: str) -> Hits:
        """Return the contexts of a list that have the text.

        It begins before the context's position or at it, or it is in the target. The script of an
        atlas page counts in the same way.
        """
        merged, number = self._state.sites[site], LISTS.index(which)
        values = merged.values[:, number].astype(np.float64)
        prompts, tokens = merged.prompts[:, number], merged.tokens[:, number].astype(np.int64)
        exists = prompts >= 0
        first = prompts << _TOKEN_BITS
        # Occurrences that begin before the window of a context, and before its end.
        before = np.searchsorted(self._starts, first + np.maximum(tokens - BEFORE, 0))
        until = np.searchsorted(self._starts, first + tokens, "right")
        explained = first + tokens if self._state.next_tokens else first
        found = exists & ((until > before) | np.isin(explained, self._targets))
        strength = np.where(found, values, 0).sum(1)
        return Hits(which, found.sum(1), exists.sum(1), strength, found.argmax(1))


def folded(text: str) -> str:
    """Return a text in the form of `Corpus.folded`."""
    return printable(text).casefold()


def starts_of(wanted: str, texts: Sequence[str]) -> list[int]:
    """Return the indices of the tokens in which a text begins; all texts are `folded`."""
    text = "".join(texts)
    if " " not in text:
        # As `readable_all` does.
        texts = [f"{shown} " for shown in texts]
        text = "".join(texts)
    at = text.find(wanted)
    if at < 0:
        return []
    ends = list(accumulate(map(len, texts)))
    found: set[int] = set()
    while at >= 0:
        found.add(bisect_right(ends, at))
        at = text.find(wanted, at + 1)
    return sorted(found)
