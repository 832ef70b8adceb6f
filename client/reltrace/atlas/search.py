"""Finds neurons and heads by what stands in their contexts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from reltrace.atlas.examples import BEFORE, Context
from reltrace.atlas.folder import State
from reltrace.atlas.reader import Reader
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
        Which.
    label : str
        Its label; "" where it has none.
    contexts : str
        Which of its lists: "relevance+", ...
    count, of : int
        In so many contexts of the list, of so many.
    strength : float
        Their values together.
    strongest : Context or None
        The strongest of them; None where the text is in the label alone.
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
    """The contexts of one list of all features of a site that have a text.

    Attributes
    ----------
    name : str
        Of the list.
    counts, of : ndarray
        int64 [L, F]: how many, and how many there are.
    strength : ndarray
        float64 [L, F]: their values together.
    first : ndarray
        int64 [L, F]: index in the list of the strongest.
    """

    name: str
    counts: Array
    of: Array
    strength: Array
    first: Array


def ranked(
    lists: Sequence[Hits], labelled: Iterable[tuple[int, int]], k: int
) -> Iterator[tuple[int, int, Hits]]:
    """Yield the features that have a text: layer, index, and the list that has it more often.

    Parameters
    ----------
    lists : sequence of Hits
        What was found.
    labelled : iterable of tuple
        Layer and index of features whose label has it: they are first.
    k : int
        At most so many.
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
    """Where a text is in the prompts of a corpus that features name.

    Parameters
    ----------
    reader : Reader
        Of the corpus.
    state : State
        What is merged.
    text : str
        However it is capitalised; it may run over several tokens and have white space of any kind.
    """

    def __init__(self, reader: Reader, state: State, text: str) -> None:
        self._state = state
        named = np.unique(np.concatenate([m.prompts.ravel() for m in state.sites.values()]))
        wanted, words = sought(text), reader.folded
        explained = {token for token, word in words.items() if wanted in word}
        # Of a prompt with such tokens the characters that several share are put together first.
        parts = {token for token, text in state.vocabulary.items() if is_partial_character(text)}
        places: list[int] = []
        # Places, or, where what is explained is the same at all of them, prompts.
        hits: list[int] = []
        for prompt, ids, target in reader.prompts(named[named >= 0]):
            first = prompt << _TOKEN_BITS
            if parts.isdisjoint(ids):
                shown = [words[token] for token in ids]
            else:
                shown = [
                    one.text.casefold() if one.number == 1 else ""
                    for one in join_partial_characters([state.vocabulary[token] for token in ids])
                ]
            places += [first + at for at in starts_of(wanted, shown)]
            if state.next_tokens:
                hits += [first + at for at, token in enumerate(ids[1:]) if token in explained]
            elif target in explained:
                hits.append(first)
        self._places, self._explained = np.array(places, np.int64), np.array(hits, np.int64)

    def hits(self, site: str, which: str) -> Hits:
        """Return the contexts of a list that have the text: it begins before the place or at it.

        Or it is what is explained. Pages of atlases count as this does.
        """
        merged, number = self._state.sites[site], LISTS.index(which)
        values = merged.values[:, number].astype(np.float64)
        prompts, tokens = merged.prompts[:, number], merged.tokens[:, number].astype(np.int64)
        there = prompts >= 0
        first = prompts << _TOKEN_BITS
        found = there & (
            self._any(first + np.maximum(tokens - BEFORE, 0), first + tokens)
            | np.isin(first + tokens if self._state.next_tokens else first, self._explained)
        )
        strength = np.where(found, values, 0).sum(1)
        return Hits(which, found.sum(1), there.sum(1), strength, found.argmax(1))

    def _any(self, low: Array, high: Array) -> Array:
        """Tell of each pair of places whether the text is between them, both included."""
        result: Array = np.searchsorted(self._places, high, "right") > np.searchsorted(
            self._places, low, "left"
        )
        return result


def sought(text: str) -> str:
    """Return what is searched for in the form that `Reader.folded` has of tokens."""
    return printable(text).casefold()


def starts_of(wanted: str, words: Sequence[str]) -> list[int]:
    """Return the indices of the tokens in which a text begins.

    Parameters
    ----------
    wanted : str
        As `sought` returns it.
    words : sequence of str
        All tokens of a prompt, as `Reader.folded` has them.
    """
    text = "".join(words)
    if " " not in text:
        # As `readable_all` shows them.
        words = [f"{word} " for word in words]
        text = "".join(words)
    at = text.find(wanted)
    if at < 0:
        return []
    ends = list(accumulate(map(len, words)))
    found: set[int] = set()
    while at >= 0:
        found.add(bisect_right(ends, at))
        at = text.find(wanted, at + 1)
    return sorted(found)
