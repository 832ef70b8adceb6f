"""Does a neuron's label tell where the neuron is strong, in text that the label was not made of?

Two atlases of one model, by the same settings: one gives labels, the other, of held-out text, the
strongest places of the same neurons. A label holds at a place if one of its tokens is there in its
role: at the place itself, among the 24 before, or as the target. It is a detector of the neuron's
strong places among all places: with the share h of the strong ones at which it holds, and the share
b of all, the area under its ROC curve is (1 + h - b) / 2. Without a label it is 1/2.

Chance are labels of other neurons of the same layer, drawn for the same places. A label beats it if
its area is larger than those of all 99 that are drawn: one label in a hundred would by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import reltrace
from numpy.typing import NDArray
from reltrace.atlas.examples import BEFORE
from reltrace.atlas.labels import is_word, label_tokens
from reltrace.types.atlas_shard import LISTS
from reltrace.types.token_text import visible_token

DRAWN = 99
"""Labels that one is compared with."""

_ROLES = ("at", "target", "before")

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of neurons, with half of its 95 % interval (binomial, by the normal curve)."""

    mean: float
    margin: float
    of: int

    @staticmethod
    def of_all(true: NDArray[np.bool_]) -> Share:
        """Return the share of what is true."""
        mean = float(true.mean())
        return Share(mean, 1.96 * float(np.sqrt(mean * (1 - mean) / true.size)), true.size)


@dataclass(frozen=True, slots=True)
class Detected:
    """What labels tell of one list of the held-out atlas.

    Attributes
    ----------
    places : str
        The list.
    labelled : Share
        Of all neurons: those that have a label.
    area, by_chance : float
        Mean area under the ROC curve over all neurons, with their labels and with drawn ones.
    beats, beats_by_chance : Share
        Of all neurons: those whose label beats chance; and how many would, were theirs drawn too.
    """

    places: str
    labelled: Share
    area: float
    by_chance: float
    beats: Share
    beats_by_chance: Share


@dataclass(frozen=True, slots=True)
class Example:
    """A neuron whose label holds in held-out text.

    Attributes
    ----------
    layer, neuron : int
        Which.
    label : str
        Its label.
    area : float
        Under the ROC curve, at the places where its relevance is strongest.
    contexts : list of str
        The three strongest of the held-out text.
    """

    layer: int
    neuron: int
    label: str
    area: float
    contexts: list[str]


class Detection:
    """The labels of one atlas, and the strong places of another.

    Parameters
    ----------
    labels, held_out : reltrace.Atlas
        Of one model, and of texts that have none in common.
    """

    def __init__(self, labels: reltrace.Atlas, held_out: reltrace.Atlas) -> None:
        self._labels, self._held_out = labels, held_out
        self._words: dict[str, int] = {}
        self._read_corpus()
        shape = labels.layers, labels.features(), 3
        self.roles: Ints = np.full(shape, -1, np.int64)
        self.words: Ints = np.full(shape, -1, np.int64)
        for layer in range(shape[0]):
            for index in range(shape[1]):
                found = label_tokens(labels._salient(("neuron", layer, index)))
                for slot, one in enumerate(found):
                    self.roles[layer, index, slot] = _ROLES.index(one.role)
                    self.words[layer, index, slot] = self._word(one.token)
        self.base = self._base_rates()

    def _word(self, token: str) -> int:
        """Return the number of a token's word: however it is capitalised, as in labels."""
        word = visible_token(token).strip().casefold()
        return self._words.setdefault(word, len(self._words))

    def _read_corpus(self) -> None:
        """Read the held-out tokens, as one sequence: words, what follows, and what is counted."""
        atlas, state = self._held_out, self._held_out._state
        words = {token: self._word(text) for token, text in state.vocabulary.items()}
        ids, starts, counted, prompt_of = [], {}, [], []
        for prompt, tokens, _ in atlas._corpus.prompts(np.arange(_end(atlas))):
            starts[prompt] = len(ids)
            ids += [words[token] for token in tokens]
            prompt_of += [prompt] * len(tokens)
            counted += [at > 0 and token not in state.special for at, token in enumerate(tokens)]
        self._starts = np.array([starts[prompt] for prompt in sorted(starts)])
        self._at, self._prompt_of = np.array(ids), np.array(prompt_of)
        same = np.append(self._prompt_of[1:] == self._prompt_of[:-1], False)
        self._next = np.where(same, np.roll(self._at, -1), -1)
        self._counted = np.array(counted)

    def _base_rates(self) -> Floats:
        """Return of each label the share of all places at which it holds: float64 [L, F]."""
        where: dict[int, list[int]] = defaultdict(list)
        for place, word in enumerate(self._at.tolist()):
            where[word].append(place)
        known: dict[frozenset[tuple[int, int]], float] = {}
        rates = np.zeros(self.roles.shape[:2])
        everywhere = int(self._counted.sum())
        for at in np.ndindex(rates.shape):
            pairs = zip(self.roles[at].tolist(), self.words[at].tolist(), strict=True)
            label = frozenset(pair for pair in pairs if pair[0] >= 0)
            if label not in known:
                holds = np.zeros(len(self._at), bool)
                for role, word in label:
                    self._mark(holds, role, np.array(where[word], np.int64))
                known[label] = int((holds & self._counted).sum()) / everywhere
            rates[at] = known[label]
        return rates

    def _mark(self, holds: NDArray[np.bool_], role: int, places: Ints) -> None:
        """Note where a word holds that is at some places."""
        steps = {"at": (0,), "target": (-1,), "before": range(1, BEFORE + 1)}[_ROLES[role]]
        for step in steps:
            to = places + step
            inside = (to >= 0) & (to < len(holds))
            to, origin = to[inside], places[inside]
            holds[to[self._prompt_of[to] == self._prompt_of[origin]]] = True

    def areas(self, of: Ints, places: Ints) -> Floats:
        """Return the area of labels for strong places.

        Parameters
        ----------
        of : ndarray
            int64 [L, F]: the neuron whose label is taken, in the same layer.
        places : ndarray
            int64 [L, F, k]: indices in the held-out tokens, -1: none.

        Returns
        -------
        ndarray
            float64 [L, F].
        """
        roles, words = (np.take_along_axis(a, of[..., None], 1) for a in (self.roles, self.words))
        there = places >= 0
        hits = np.zeros(places.shape, bool)
        for slot in range(roles.shape[2]):
            role, word = roles[..., slot], words[..., slot]
            hits |= (role == 0)[..., None] & (self._at[places] == word[..., None])
            hits |= (role == 1)[..., None] & (self._next[places] == word[..., None])
            layer, index = np.nonzero(role == 2)
            near = places[layer, index]
            for step in range(1, BEFORE + 1):
                back = np.maximum(near - step, 0)
                same = (near >= step) & (self._prompt_of[back] == self._prompt_of[near])
                hits[layer, index] |= same & (self._at[back] == word[layer, index][:, None])
        share = (hits & there).sum(-1) / np.maximum(there.sum(-1), 1)
        base = np.take_along_axis(self.base, of, 1)
        areas: Floats = np.where(there.any(-1), (1 + share - base) / 2, 0.5)
        return areas

    def places(self, name: str) -> Ints:
        """Return the places of a list of the held-out atlas: int64 [L, F, k], -1: none."""
        merged, which = self._held_out._state.sites["neuron"], LISTS.index(name)
        prompts, tokens = merged.prompts[:, which], merged.tokens[:, which]
        places = np.where(prompts >= 0, self._starts[np.maximum(prompts, 0)] + tokens, -1)
        found: Ints = places.transpose(0, 2, 1)
        return found

    def own(self) -> Ints:
        """Return of each neuron itself."""
        return np.broadcast_to(np.arange(self.roles.shape[1]), self.roles.shape[:2]).copy()

    def measure(self, name: str, seed: int) -> Detected:
        """Compare labels with drawn ones, at the places of a list."""
        random = np.random.default_rng(seed)
        places = self.places(name)
        own, features = self.own(), self.roles.shape[1]
        # Each time that of the neuron so many further on, so that none is a neuron's own.
        steps = 1 + random.choice(features - 1, DRAWN + 1, replace=False)
        drawn = [self.areas((own + step) % features, places) for step in steps]
        best = np.max(drawn[:-1], axis=0)
        area = self.areas(own, places)
        return Detected(
            places=name,
            labelled=Share.of_all((self.roles >= 0).any(-1)),
            area=float(area.mean()),
            by_chance=float(np.mean(drawn)),
            beats=Share.of_all(area > best),
            beats_by_chance=Share.of_all(drawn[-1] > best),
        )

    def examples(self, most: int, least: int) -> list[Example]:
        """Return neurons whose label holds best in the held-out text.

        The rule: neurons whose label begins with a word (not with punctuation), and whose label and
        whose held-out places are of at least so many prompts; by the area of the label at the
        strongest places of positive relevance; of each layer one, and of labels that begin with the
        same word in the same role one.
        """
        area = self.areas(self.own(), self.places("relevance+"))
        enough = np.ones(area.shape, bool)
        for atlas in (self._labels, self._held_out):
            prompts = atlas._state.sites["neuron"].prompts[:, LISTS.index("relevance+")]
            ordered = np.sort(prompts, axis=1)
            distinct = (np.diff(ordered, axis=1) > 0).sum(1) + (ordered[:, 0] >= 0)
            enough &= distinct >= least
        found: list[Example] = []
        seen: set[object] = set()
        words = {number for word, number in self._words.items() if is_word(word)}
        for flat in np.argsort(-np.where(enough, area, 0), axis=None, kind="stable"):
            layer, index = np.unravel_index(flat, area.shape)
            first = int(self.roles[layer, index, 0]), int(self.words[layer, index, 0])
            if len(found) == most or not enough[layer, index]:
                break
            if first in seen or layer in seen or first[1] not in words:
                continue
            seen |= {first, layer}
            held_out = self._held_out.neuron(int(layer), int(index))
            strongest = held_out.contexts.first("relevance+", 3)
            found.append(
                Example(
                    int(layer),
                    int(index),
                    self._labels.label(int(layer), int(index)),
                    float(area[layer, index]),
                    [f"{context} → {context.target.strip()}" for context in strongest],
                )
            )
        return found


def _end(atlas: reltrace.Atlas) -> int:
    """Return how many prompts a corpus has, with those that were left out."""
    return atlas.prompts + len(atlas.skipped)


def detect(
    labels: reltrace.Atlas, held_out: reltrace.Atlas, lists: Sequence[str], seed: int
) -> tuple[list[Detected], list[Example]]:
    """Measure what labels tell of held-out text; see the module."""
    detection = Detection(labels, held_out)
    return [detection.measure(name, seed) for name in lists], detection.examples(10, 12)
