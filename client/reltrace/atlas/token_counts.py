"""How often every token is in a corpus, and which stand out in a part of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from reltrace.types.arrays import Array

_PRIOR = 10.0
"""Tokens that the corpus is taken to have added to either side: what was seen once, says little."""


@dataclass(eq=False)
class WordCounts:
    """Counts of tokens, by their ids.

    Attributes
    ----------
    places : ndarray
        int64 [V]: places that are counted where the token is.
    prompts : ndarray
        int64 [V]: prompts that have it.
    targets : ndarray
        int64 [V]: prompts of which it is what is explained; where prompts explain their own next
        tokens, places that it follows.
    """

    places: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    prompts: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    targets: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, token_ids: Array, lengths: Array, counted: Array, targets: Array) -> None:
        """Add the corpus of a slice.

        Parameters
        ----------
        token_ids, lengths : ndarray
            As `AtlasPart` has them.
        counted : ndarray
            bool [T]: whether a token is at a place that is counted.
        targets : ndarray
            int [N]: tokens that are explained.
        """
        size = 1 + max((int(a.max()) for a in (token_ids, targets) if a.size), default=-1)
        prompt = np.repeat(np.arange(len(lengths)), lengths)
        pairs = np.unique(prompt * size + token_ids)
        self.places = _sum(self.places, np.bincount(token_ids[counted], minlength=size))
        self.prompts = _sum(self.prompts, np.bincount(pairs % max(size, 1), minlength=size))
        self.targets = _sum(self.targets, np.bincount(targets, minlength=size))


def _sum(one: Array, other: Array) -> Array:
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def log_odds(inside: Array, of: int, everywhere: Array, of_all: int) -> Array:
    """Return how much tokens stand out in a part of a corpus, in standard deviations.

    The log-odds of each token in the part against those in the corpus, with the corpus' own
    frequencies as the prior (of 10 tokens), divided by their standard deviation: equations 16, 19
    and 22 of Monroe, Colaresi and Quinn, "Fightin' Words" (2008). (Not the shorter equation 20: it
    takes every token to be rare, and here one may be in all of the part.)

    Parameters
    ----------
    inside : ndarray
        int [N]: how often each token was seen in the part.
    of : int
        How often any token was.
    everywhere : ndarray
        int [N], positive: the same of the whole corpus, the part with it.
    of_all : int
        Of the whole corpus.

    Returns
    -------
    ndarray
        float64 [N].
    """
    prior = _PRIOR * everywhere / of_all
    (here, not_here), (there, not_there) = (
        # A token that is everywhere would divide by 0, or by what rounding leaves of it.
        (seen + prior, np.maximum(any_ + _PRIOR - seen - prior, 1e-9))
        for seen, any_ in ((inside, of), (everywhere, of_all))
    )
    difference = np.log(here / not_here) - np.log(there / not_there)
    result: Array = difference / np.sqrt(1 / here + 1 / not_here + 1 / there + 1 / not_there)
    return result
