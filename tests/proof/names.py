"""Who gets the drink? Sentences whose next word is a name, and which of two it is stands in them.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary", the indirect
object, rather than " John", the subject (Wang et al., "Interpretability in the Wild: a Circuit for
Indirect Object Identification in GPT-2 small", ICLR 2023). The target is the difference of their
logits. The indirect object's name is what is copied; the subject's second mention excludes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import reltrace
from reltrace.evaluation.scores import Mean

NAMES = ("Mary", "John", "Tom", "Anna", "Peter", "Sarah", "David", "Emma")
"""Each of them, with the space before it, is one token."""

PLACES = (
    "When {} and {} went to the store, {} gave a drink to",
    "When {} and {} were at the park, {} threw the ball to",
    "After {} and {} had dinner at home, {} told a story to",
    "While {} and {} were working at the office, {} showed a letter to",
)

RULES = ("attnlrp", "cp_lrp", "gradient")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence, who gets something in it, and who gives it."""

    prompt: str
    indirect_object: str
    subject: str

    @property
    def object_first(self) -> bool:
        """The indirect object is named before the subject."""
        return self.prompt.index(self.indirect_object) < self.prompt.index(self.subject)

    @property
    def target(self) -> reltrace.Target:
        """The indirect object's name against the subject's."""
        return reltrace.Target(f" {self.indirect_object}", contrast=f" {self.subject}")

    def parts(self, tokens: Sequence[str]) -> dict[str, list[int]]:
        """Return positions of the tokens by what they are."""
        indirect = [i for i, token in enumerate(tokens) if token.strip() == self.indirect_object]
        subject = [i for i, token in enumerate(tokens) if token.strip() == self.subject]
        assert len(indirect) == 1, tokens
        assert len(subject) == 2, tokens
        named = {
            "indirect object": indirect,
            "subject": subject[:1],
            "subject again": subject[1:],
            "first token": [0],
        }
        rest = set(range(len(tokens))).difference(*named.values())
        return named | {"other tokens": sorted(rest)}


@dataclass(frozen=True, slots=True)
class Shares:
    """Where one rule sees the relevance of the difference, in sentences of one order of the names.

    Attributes
    ----------
    rule, order : str
        Which.
    solved : Mean
        Share of sentences in which the indirect object's name has the larger logit.
    parts : dict of str to Mean
        Relevance of each part of a sentence, over the sum of |R| of all tokens.
    """

    rule: str
    order: str
    solved: Mean
    parts: dict[str, Mean]


def sentences(count: int, seed: int) -> list[Sentence]:
    """Draw so many different ones, as many of either order of the names."""
    every = [
        [
            Sentence(place.format(*((io, s) if first else (s, io)), s), io, s)
            for place, pair in product(PLACES, combinations(NAMES, 2))
            for io, s in (pair, pair[::-1])
        ]
        for first in (True, False)
    ]
    draw = np.random.default_rng(seed).permutation(len(every[0]))[: count // 2]
    return [of_order[i] for i in draw for of_order in every]


def shares(client: reltrace.Client, given: Sequence[Sentence]) -> list[Shares]:
    """Trace every sentence by every rule."""
    found: list[Shares] = []
    for rule in RULES:
        items = [{"prompt": one.prompt, "target": one.target} for one in given]
        traces: list[Any] = list(client.trace_many(items, sites="embed", rule=rule, ordered=True))
        for order in (True, False):
            some = [
                (one, trace)
                for one, trace in zip(given, traces, strict=True)
                if one.object_first is order
            ]
            parts: dict[str, list[float]] = {}
            for one, trace in some:
                relevance = trace["embed"]
                for part, where in one.parts(trace.tokens).items():
                    share = float(relevance[where].sum() / np.abs(relevance).sum())
                    parts.setdefault(part, []).append(share)
            found.append(
                Shares(
                    rule,
                    f"{'indirect object' if order else 'subject'} named first",
                    Mean.of([float(trace.target.logit > 0) for _, trace in some]),
                    {part: Mean.of(values) for part, values in parts.items()},
                )
            )
    return found
