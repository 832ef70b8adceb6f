"""Built-in labels of neurons and heads: the tokens that are salient in their contexts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from reltrace.atlas.corpus import Corpus
from reltrace.atlas.examples import BEFORE, SalientToken
from reltrace.atlas.state import State
from reltrace.types.arrays import Array
from reltrace.types.token_text import visible_token

_LABEL_TOKENS = 3

_MIN_SCORE = 3.0
_MIN_COUNT, _MIN_SHARE = 2, 0.25
"""A salient token is in so many contexts, and in such a share of them."""

_PUNCTUATION_WEIGHT = 0.5
"""Of the score of punctuation and white space, against that of a word."""

_PRIOR = 10.0
"""Tokens of the prior in `log_odds`, against chance for tokens that were seen once."""

_ROLES = {"at": "", "before": "… ", "target": "→ "}


def salient_tokens(
    corpus: Corpus, state: State, prompts: Sequence[int], positions: Sequence[int]
) -> list[SalientToken]:
    """Return the tokens that are salient at, before, or as the target of examples.

    The clearest first.
    """
    counts = state.counts
    at: Counter[int] = Counter()
    before: dict[int, set[int]] = {}
    for prompt, position in zip(prompts, positions, strict=True):
        *preceding, token = corpus.ids_up_to(prompt, position, BEFORE)
        at[token] += 1
        before.setdefault(prompt, set()).update(preceding)
    # Examples in one prompt share what is before them, and, unless that is each one's next token,
    # the target: these count once.
    around = Counter(token for tokens in before.values() for token in tokens)
    explained = (
        zip(prompts, positions, strict=True)
        if state.next_tokens
        else ((prompt, 0) for prompt in before)
    )
    targets = Counter(corpus.target_id(prompt, position) for prompt, position in explained)
    targets.pop(-1, None)
    of_targets = int(counts.targets.sum())
    found = [
        *_salient(state, "at", at, len(prompts), counts.positions, state.counted),
        *_salient(state, "target", targets, targets.total(), counts.targets, of_targets),
        *_salient(state, "before", around, len(before), counts.prompts, state.prompts),
    ]
    return sorted(found, key=lambda one: -one.score)


def _salient(
    state: State, role: str, inside: Counter[int], of: int, everywhere: Array, of_all: int
) -> Iterable[SalientToken]:
    least = max(_MIN_COUNT, _MIN_SHARE * of)
    ids = sorted(token for token, count in inside.items() if count >= least)
    counts = np.array([inside[token] for token in ids], np.int64)
    scores = log_odds(counts, of, everywhere[ids], of_all) if ids else ()
    for token, count, score in zip(ids, counts, scores, strict=True):
        if score >= _MIN_SCORE:
            yield SalientToken(state.vocabulary[token], role, int(count), of, float(score))


def log_odds(inside: Array, of: int, everywhere: Array, of_all: int) -> Array:
    """Return the log-odds of tokens in a part of a corpus against the corpus.

    With the corpus' own frequencies as the prior, divided by their standard deviation: equations
    16, 19 and 22 of Monroe, Colaresi and Quinn, "Fightin' Words" (2008). (Not the shorter equation
    20: it takes every token to be rare, and here one may be in all of the part.)

    int [N], counts of the tokens in the part and in the corpus with the part; `of` and `of_all` are
    the counts of all tokens in these. Returns float64 [N].
    """
    prior = _PRIOR * everywhere / of_all
    (here, not_here), (there, not_there) = (
        # At least 1e-9: 0, or its rounding error, for a token that is everywhere.
        (seen + prior, np.maximum(total + _PRIOR - seen - prior, 1e-9))
        for seen, total in ((inside, of), (everywhere, of_all))
    )
    difference = np.log(here / not_here) - np.log(there / not_there)
    result: Array = difference / np.sqrt(1 / here + 1 / not_here + 1 / there + 1 / not_there)
    return result


def label_tokens(found: Sequence[SalientToken]) -> list[SalientToken]:
    """Return the tokens of a label, up to three, the clearest first.

    Each word once, however it is capitalised, in the role in which it is clearest. The score of a
    token without a letter or digit (white space, punctuation) counts half: so a neuron of full
    stops is labelled "." unless a word is at least half as clear.
    """
    words: dict[str, SalientToken] = {}
    for one in found:
        words.setdefault(visible_token(one.token).strip().casefold(), one)
    ordered = sorted(
        words.values(),
        key=lambda one: -one.score * (1.0 if is_word(one.token) else _PUNCTUATION_WEIGHT),
    )
    return ordered[:_LABEL_TOKENS]


def is_word(token: str) -> bool:
    return any(char.isalnum() for char in token)


def label_of(found: Sequence[SalientToken]) -> str:
    """Return the label of salient tokens: ``dogs``, ``… before``, ``→ explained``."""
    return " · ".join(
        _ROLES[one.role] + visible_token(one.token).strip() for one in label_tokens(found)
    )
