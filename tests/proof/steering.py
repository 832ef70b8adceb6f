"""Do labels say what neurons stand for? Steer by them and see whether the model says it.

Every neuron of the last layer whose label begins with an answer, "→ dogs", is set to what it is
where it speaks for predictions, times a factor, in prompts that ask for something else and that
the atlas has not seen. So is
another neuron of that layer, drawn by chance, to its own value; and the log-probability of the
answer that the first one's label names is read at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import reltrace
from demo_model.corpus import Example, held_out
from reltrace.evaluation.scores import Mean

PROMPTS = 20
"""In which each neuron is steered."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What steering with one factor did.

    Attributes
    ----------
    times : float
        The factor.
    neurons, answers : int
        How many have such a label, and how many different answers these name.
    labelled, chance : Mean
        By how much the log-probability of the label's answer rose, with the labelled neuron and
        with another; over neurons.
    more, more_by_answer : Mean
        By how much more it rose, neuron by neuron; and over answers, each the mean of its neurons:
        what two of them do is not two findings.
    wins : Mean
        Share of neurons that raised it more than the other did.
    factor, chance_factor : float
        Medians of what the answer's probability was multiplied by.
    says : float
        Share of prompts in which the labelled neuron made the answer what the model predicts.
    """

    times: float
    neurons: int
    answers: int
    labelled: Mean
    chance: Mean
    more: Mean
    more_by_answer: Mean
    wins: Mean
    factor: float
    chance_factor: float
    says: float


def unseen(corpus: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return held-out sentences that are not in a corpus.

    Another seed is not enough: most kinds of sentences are few, and come up again.
    """
    seen = {example.prompt for example in corpus}
    found = [example for example in held_out(10 * count, seed) if example.prompt not in seen]
    assert len(found) >= count
    return found[:count]


def answers_of(atlas: reltrace.Atlas, layer: int, words: set[str]) -> dict[int, str]:
    """Return the neurons of a layer whose label begins with an answer, and the answer."""
    found = {}
    for index in range(atlas.features()):
        clearest = atlas.neuron(layer, index).salient_tokens[:1]
        if clearest and clearest[0].role == "target" and clearest[0].token.strip() in words:
            found[index] = clearest[0].token
    return found


def steer(
    client: reltrace.Client,
    atlas: reltrace.Atlas,
    answers: set[str],
    examples: Sequence[Example],
    times: Sequence[float],
    seed: int,
    most: int | None = None,
) -> list[Steering]:
    """Steer the labelled neurons of the last layer, and others.

    Parameters
    ----------
    client : reltrace.Client
        Of a service that serves the model.
    atlas : reltrace.Atlas
        With the labels.
    answers : set of str
        Words that count as answers.
    examples : sequence of Example
        From which prompts are drawn, those that ask for something else.
    times : sequence of float
        Factors.
    seed : int
        Of what is drawn.
    most : int, optional
        Only the first so many neurons, by their index.
    """
    layer = atlas.layers - 1
    labelled = dict(list(answers_of(atlas, layer, answers).items())[:most])
    usable = [i for i in range(atlas.features()) if _usable(atlas, layer, i)]
    chance = np.random.default_rng(seed)
    rose: dict[float, list[tuple[float, float, float]]] = {factor: [] for factor in times}
    for index, answer in labelled.items():
        other = int(chance.choice([i for i in usable if i != index]))
        others = [e.prompt for e in examples if e.answer != answer.strip()]
        prompts = [others[i] for i in chance.permutation(len(others))[:PROMPTS]]
        before, _ = _read(client, prompts, answer, [])
        for factor in times:
            own, said = _read(client, prompts, answer, [atlas.neuron(layer, index).steer(factor)])
            its, _ = _read(client, prompts, answer, [atlas.neuron(layer, other).steer(factor)])
            rose[factor].append((own - before, its - before, said))
    names = list(labelled.values())
    return [_summed(factor, names, np.array(found)) for factor, found in rose.items()]


def _usable(atlas: reltrace.Atlas, layer: int, index: int) -> bool:
    return bool(atlas.neuron(layer, index).contexts["relevance+"])


def _read(
    client: reltrace.Client, prompts: Sequence[str], answer: str, edits: list[reltrace.Steer]
) -> tuple[float, float]:
    """Return the answer's mean log-probability, and in what share it is what is predicted."""
    targets = [reltrace.Target(answer, logprob=True), reltrace.Target()]
    results: Any = client.trace_many(prompts, target=targets, sites=(), edits=edits)
    found = [(named.target.logit, best.target.token == answer) for named, best in results]
    mean, said = np.mean(found, axis=0).tolist()
    return mean, said


def _summed(times: float, answers: Sequence[str], found: np.ndarray) -> Steering:
    labelled, chance, said = found.T
    more = labelled - chance
    by_answer: dict[str, list[float]] = {}
    for answer, value in zip(answers, more.tolist(), strict=True):
        by_answer.setdefault(answer, []).append(value)
    return Steering(
        times,
        len(more),
        len(by_answer),
        Mean.of(labelled.tolist()),
        Mean.of(chance.tolist()),
        Mean.of(more.tolist()),
        Mean.of([float(np.mean(values)) for values in by_answer.values()]),
        Mean.of((more > 0).tolist()),
        float(np.exp(np.median(labelled))),
        float(np.exp(np.median(chance))),
        float(said.mean()),
    )
