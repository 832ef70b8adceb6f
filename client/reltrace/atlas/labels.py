"""Labels of neurons and heads that nobody labelled: the tokens that stand out in their contexts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from reltrace.atlas.examples import BEFORE, StandsOut
from reltrace.atlas.folder import State
from reltrace.atlas.reader import Reader
from reltrace.atlas.token_counts import log_odds
from reltrace.types.arrays import Array
from reltrace.types.token_text import visible_token

_WORDS = 3
"""Of a label."""

_LEAST_SCORE = 3.0
_LEAST_COUNT, _LEAST_SHARE = 2, 0.25
"""A token stands out that is in so many contexts, and in such a share of them."""

_MARKS_WEIGH = 0.5
"""What the score of punctuation and white space counts, beside that of a word."""

_ROLES = {"at": "", "before": "… ", "target": "→ "}


class Standouts:
    """Finds what stands out in contexts.

    Parameters
    ----------
    reader : Reader
        Of the corpus.
    state : State
        What is merged.
    """

    def __init__(self, reader: Reader, state: State) -> None:
        self._reader = reader
        self._state = state

    def of(self, prompts: Sequence[int], positions: Sequence[int]) -> list[StandsOut]:
        """Return the tokens that stand out at places, before them and as what is explained.

        Parameters
        ----------
        prompts, positions : sequence of int
            The places.
        """
        read, words = self._reader, self._state.words
        at: Counter[int] = Counter()
        before: dict[int, set[int]] = {}
        for prompt, position in zip(prompts, positions, strict=True):
            *around_it, token = read.ids_up_to(prompt, position, BEFORE)
            at[token] += 1
            before.setdefault(prompt, set()).update(around_it)
        # Of places in one prompt, what is around them is not seen again; nor is what is explained,
        # unless it is the token that follows the place.
        around = Counter(token for tokens in before.values() for token in tokens)
        explained = (
            zip(prompts, positions, strict=True)
            if self._state.next_tokens
            else ((prompt, 0) for prompt in before)
        )
        targets = Counter(read.target_id(prompt, position) for prompt, position in explained)
        targets.pop(-1, None)
        found = [
            *self._among("at", at, len(prompts), words.places, self._state.places),
            *self._among(
                "target", targets, targets.total(), words.targets, int(words.targets.sum())
            ),
            *self._among("before", around, len(before), words.prompts, self._state.prompts),
        ]
        return sorted(found, key=lambda one: -one.score)

    def _among(
        self, role: str, inside: Counter[int], of: int, everywhere: Array, of_all: int
    ) -> Iterable[StandsOut]:
        least = max(_LEAST_COUNT, _LEAST_SHARE * of)
        ids = sorted(token for token, count in inside.items() if count >= least)
        counts = np.array([inside[token] for token in ids], np.int64)
        scores = log_odds(counts, of, everywhere[ids], of_all) if ids else ()
        for token, count, score in zip(ids, counts, scores, strict=True):
            if score >= _LEAST_SCORE:
                text = self._state.vocabulary[token]
                yield StandsOut(text, role, int(count), of, float(score))


def chosen(found: Sequence[StandsOut]) -> list[StandsOut]:
    """Return what a label is made of: up to three tokens, the clearest first.

    Each word once, however it is capitalised, in the role in which it is clearest. The score of a
    token without a letter or digit (white space, punctuation) counts half: a neuron of full stops
    is called so where no word stands out at least half as clearly.

    Parameters
    ----------
    found : sequence of StandsOut
        What stands out, the clearest first.
    """
    words: dict[str, StandsOut] = {}
    for one in found:
        words.setdefault(visible_token(one.token).strip().casefold(), one)
    ordered = sorted(
        words.values(), key=lambda one: -one.score * (1.0 if is_word(one.token) else _MARKS_WEIGH)
    )
    return ordered[:_WORDS]


def is_word(token: str) -> bool:
    """Tell whether a token has a letter or a digit."""
    return any(char.isalnum() for char in token)


def label_of(found: Sequence[StandsOut]) -> str:
    """Return a label of what stands out: ``dogs``, ``… before``, ``→ explained``."""
    return " · ".join(_ROLES[one.role] + visible_token(one.token).strip() for one in chosen(found))
