"""Does one neuron decide a word? Scale the most relevant one, and read what the model writes.

In every prompt the neuron that is most relevant to the predicted token, of all layers, is scaled.
So is the one that is most relevant in another prompt, which leaves out neurons that matter
everywhere, and one of the same layer as the first, drawn by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import reltrace
from reltrace.evaluation.scores import Mean

WAYS = ("relevant here", "relevant elsewhere", "by chance")
"""Which neuron is scaled: the most relevant one of this prompt, of another, one of chance."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What the model writes, and what it writes with one neuron scaled."""

    prompt: str
    layer: int
    neuron: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class OneNeuron:
    """What scaling one neuron did.

    Attributes
    ----------
    scale : float
        By what: 0 switches it off, -1 reverses it.
    changed : dict of str to Mean
        Share of prompts in which the model then predicts another token, by which neuron it was.
    more : dict of str to Mean
        By how much that share is larger than with another prompt's neuron, and with one of chance.
    texts : list of Rewritten
        Of the first prompts, by their own most relevant neuron.
    """

    scale: float
    changed: dict[str, Mean]
    more: dict[str, Mean]
    texts: list[Rewritten]


def scale_one(
    client: reltrace.Client, prompts: Sequence[str], scale: float, written: int, seed: int
) -> OneNeuron:
    """Scale one neuron in every prompt, and write out the first few.

    Parameters
    ----------
    client : reltrace.Client
        Of a service with one model.
    prompts : sequence of str
        Each with what the model predicts as its target.
    scale : float
        What neurons are multiplied by, at every token.
    written : int
        How many texts are written.
    seed : int
        Of what is drawn.
    """
    traces: list[Any] = list(
        client.trace_many(prompts, sites="neuron", reduce="feature", ordered=True)
    )
    draw = np.random.default_rng(seed)
    best = [np.unravel_index(t["neuron"].argmax(), t["neuron"].shape) for t in traces]
    best = [(int(layer), int(neuron)) for layer, neuron in best]
    chosen = []
    for number, (layer, neuron) in enumerate(best):
        others = [one for one in best[number + 1 :] + best[:number] if one != (layer, neuron)]
        width = traces[number]["neuron"].shape[1]
        chance = (neuron + int(draw.integers(1, width))) % width
        chosen.append(((layer, neuron), others[0], (layer, chance)))
    items = [
        {
            "input_ids": trace.token_ids,
            "sites": (),
            "edits": reltrace.Edit("neuron", *one, scale=scale),
        }
        for trace, neurons in zip(traces, chosen, strict=True)
        for one in neurons
    ]
    results: list[Any] = list(client.trace_many(items, ordered=True))
    changed: dict[str, list[float]] = {way: [] for way in WAYS}
    for index, result in enumerate(results):
        number, way = divmod(index, len(WAYS))
        other = result.target.token_id != traces[number].target.token_id
        changed[WAYS[way]].append(float(other))
    texts = []
    for prompt, (layer, neuron) in list(zip(prompts, best, strict=True))[:written]:
        edit = reltrace.Edit("neuron", layer, neuron, scale=scale)
        text = client.generate(prompt, steer=edit, max_new_tokens=8)
        assert text.unsteered is not None
        texts.append(Rewritten(prompt, layer, neuron, text.unsteered.text, text.text))
    found = {way: np.array(values) for way, values in changed.items()}
    return OneNeuron(
        scale,
        {way: Mean.of(values.tolist()) for way, values in found.items()},
        {way: Mean.of((found[WAYS[0]] - found[way]).tolist()) for way in WAYS[1:]},
        texts,
    )
