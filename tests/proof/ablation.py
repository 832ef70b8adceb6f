"""Does the relevance name the neurons that a prediction rests on? Switch them off and see.

For every prompt all neurons of all layers are ordered by relevance, by activation and by chance.
The first of each are set to 0 at all tokens, and the logit of what the model predicted is read
again. Relevance has a sign and activation is taken without one, which favours relevance in how far
the logit falls; so how far it moves counts, and relevance is also ordered by its size alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import reltrace
import torch
from reltrace.evaluation.scores import Mean
from transformers import AutoModelForCausalLM

WAYS = ("relevance", "size", "activation", "chance")
"""By which neurons are ordered: R, |R|, |a|, and at random; R and a are summed over tokens."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """What switching off so many neurons did.

    Attributes
    ----------
    neurons : int
        How many were switched off.
    fell, moved : dict of str to Mean
        By how they were chosen: how far the target's logit fell, and how far it moved either way.
    more, size_more : dict of str to Mean
        How much further it moved with those of the relevance, and with those of its size, than
        with those by activation and by chance; prompt by prompt.
    """

    neurons: int
    fell: dict[str, Mean]
    moved: dict[str, Mean]
    more: dict[str, Mean]
    size_more: dict[str, Mean]


def activations(checkpoint: str, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the size of every neuron's activation, summed over tokens: float64 [L, F] each.

    Read by plain hooks on the model as transformers loads it: nothing of reltrace's is in between.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    seen: list[np.ndarray] = []

    def note(_: Any, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0][0].abs().double().sum(0).numpy())

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(note)
    found = []
    with torch.no_grad():
        for ids in prompts:
            seen.clear()
            model(torch.tensor([list(ids)]))
            found.append(np.stack(seen))
    return found


def ablate(
    client: reltrace.Client,
    checkpoint: str,
    prompts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
) -> list[Ablation]:
    """Switch off so many neurons of each prompt, chosen in each way.

    Parameters
    ----------
    client : reltrace.Client
        Of a service that serves the checkpoint.
    checkpoint : str
        From which activations are read.
    prompts : sequence of str
        Each with what the model predicts as its target.
    numbers : sequence of int
        How many neurons are switched off.
    seed : int
        Of the order by chance.
    """
    traces = [
        trace
        for trace in client.trace_many(prompts, sites="neuron", reduce="feature", ordered=True)
        if isinstance(trace, reltrace.Trace)
    ]
    assert len(traces) == len(prompts)
    active = activations(checkpoint, [trace.token_ids for trace in traces])
    chance = np.random.default_rng(seed)
    jobs, slots = [], []
    for number, (trace, activation) in enumerate(zip(traces, active, strict=True)):
        scores = {
            "relevance": trace["neuron"],
            "size": np.abs(trace["neuron"]),
            "activation": activation,
            "chance": chance.standard_normal(activation.shape),
        }
        for way in WAYS:
            order = np.argsort(-scores[way], axis=None, kind="stable")
            for count in numbers:
                slots.append((number, way, count))
                jobs.append(
                    {
                        "input_ids": trace.token_ids,
                        # What was predicted, whatever is predicted now.
                        "target": reltrace.Target(trace.target.token_id),
                        "sites": (),
                        "edits": _off(order[:count], activation.shape[1]),
                    }
                )
    fell: dict[tuple[str, int], list[float]] = {}
    for (number, way, count), result in zip(
        slots, client.trace_many(jobs, ordered=True), strict=True
    ):
        assert isinstance(result, reltrace.Trace), result
        drop = traces[number].target.logit - result.target.logit
        fell.setdefault((way, count), []).append(drop)
    return [_summed(count, {way: np.array(fell[way, count]) for way in WAYS}) for count in numbers]


def _off(chosen: np.ndarray, width: int) -> list[reltrace.Edit]:
    layers: dict[int, list[int]] = {}
    for flat in chosen.tolist():
        layer, neuron = divmod(flat, width)
        layers.setdefault(layer, []).append(neuron)
    return [reltrace.Edit("neuron", layer, own, scale=0.0) for layer, own in layers.items()]


def _summed(count: int, fell: dict[str, np.ndarray]) -> Ablation:
    moved = {way: np.abs(drops) for way, drops in fell.items()}
    more, size_more = (
        {way: Mean.of((moved[by] - moved[way]).tolist()) for way in ("activation", "chance")}
        for by in ("relevance", "size")
    )
    return Ablation(
        count,
        {way: Mean.of(drops.tolist()) for way, drops in fell.items()},
        {way: Mean.of(sizes.tolist()) for way, sizes in moved.items()},
        more,
        size_more,
    )
