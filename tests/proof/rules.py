"""Which rule knows what a prediction rests on? Sentences whose answer stands in the prompt tell.

Tokens, and then neurons, are switched off in the order of each rule: `reltrace.Client.evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import reltrace
from demo_model.corpus import Example
from reltrace.evaluation.scores import Mean


@dataclass(frozen=True, slots=True)
class Judged:
    """How a rule did.

    Attributes
    ----------
    rule : str
        Which; "random" is an order of chance.
    tokens, neurons : Mean
        Area between the curves with these switched off, by log-probability.
    hit : Mean
        Share of prompts whose most relevant token is the answer.
    mass : Mean
        Share of the positive relevance that is on it.
    """

    rule: str
    tokens: Mean
    neurons: Mean
    hit: Mean
    mass: Mean


def judge(client: reltrace.Client, examples: Sequence[Example], seed: int) -> list[Judged]:
    """Judge every rule.

    Parameters
    ----------
    client : reltrace.Client
        Of a service that serves the demo model.
    examples : sequence of Example
        Each with its answer as the target, and as what the prediction is known to rest on.
    seed : int
        Of the order of chance.
    """
    prompts = [{"prompt": e.prompt, "target": f" {e.answer}", "answer": e.answer} for e in examples]
    tokens, neurons = (
        client.evaluate(prompts, site=site, seed=seed) for site in ("embed", "neuron")
    )
    assert tokens.prompts == neurons.prompts == len(examples), (tokens.failures, neurons.failures)
    found = []
    for rule, score in tokens.rules.items():
        assert score.hit is not None
        assert score.mass is not None
        found.append(Judged(rule, score.area, neurons.rules[rule].area, score.hit, score.mass))
    return found
