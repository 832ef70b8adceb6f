"""What one prompt's target is while tokens are replaced or neurons switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reltrace.evaluation.plan import RANDOM, Plan
from reltrace.evaluation.prompts import Prompt
from reltrace.evaluation.scores import Floats, strongest_first, tokens_at
from reltrace.types.edit import Edit
from reltrace.types.errors import invalid
from reltrace.types.target import Target
from reltrace.types.trace import Trace


@dataclass(slots=True)
class Curves:
    """The curves of one prompt.

    Attributes
    ----------
    prompt : Prompt
        Which.
    plan : Plan
        What is done with it.
    trace : Trace
        By the first rule; which token is the target, any rule says.
    free : tuple of int
        Positions of the prompt's tokens that are not kept.
    orders : dict of str to ndarray
        By rule: what is switched off, the most relevant first; indices of tokens or of neurons.
    at : ndarray
        What is switched off at each point.
    located : dict of str to (float, float)
        By rule: whether the answer is strongest, and the share of positive relevance on it.
    answer : tuple of int or None
        The answer's tokens; None: it is not known, or neurons are switched off.
    values : dict of tuple of int to float
        What was measured by what is switched off, as rising indices.
    """

    prompt: Prompt
    plan: Plan
    trace: Trace
    free: tuple[int, ...]
    orders: dict[str, NDArray[np.int64]]
    at: Floats
    located: dict[str, tuple[float, float]]
    answer: tuple[int, ...] | None
    values: dict[tuple[int, ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, traces: Mapping[str, Trace], plan: Plan) -> Curves:
        """Return the curves of a prompt, by its traces by rule, with nothing measured yet.

        Raises
        ------
        InvalidArgument
            The prompt has no token that may be replaced, or not the answer, or its target has
            nothing of the kind that is measured.
        """
        trace = next(iter(traces.values()))
        if plan.measure == "probability" and trace.target.contrast_id is not None:
            raise invalid("measure", "a contrast has no probability, but a logit")
        # Behind the prompt's own tokens are those of a continuation.
        ids = _prompt_ids(trace)
        tokens = plan.site == "embed"
        scores = {
            rule: one[plan.site].astype(np.float64).ravel()[: len(ids) if tokens else None]
            for rule, one in traces.items()
        }
        length = len(scores[next(iter(scores))])
        if RANDOM in plan.rules:
            # Whichever prompts come beside it: its own order.
            scores[RANDOM] = np.random.default_rng([plan.seed, *ids]).standard_normal(length)
        kept = plan.kept(trace)
        free = [position for position in range(len(ids)) if position not in kept]
        if not free:
            raise invalid("prompt", f"has no token to replace: of its {len(ids)}, all are kept")
        orders = {rule: strongest_first(scores[rule]) for rule in plan.rules}
        if tokens:
            orders = {rule: order[np.isin(order, free)] for rule, order in orders.items()}
        answer = None
        if prompt.answer is not None and tokens:
            answer = tuple(prompt.where(trace, len(ids)))
        located = {}
        if answer is not None:
            located = {rule: _located(answer, scores[rule]) for rule in plan.rules}
        return cls(prompt, plan, trace, tuple(free), orders, plan.at(length), located, answer)

    @property
    def without_answer(self) -> tuple[int, ...]:
        """The answer's tokens, so far as they may be replaced."""
        return tuple(sorted(set(self.answer or ()) & set(self.free)))

    def off(self, rule: str, most: bool) -> Iterator[tuple[int, ...]]:
        """Yield what is switched off at each point, most or least relevant first."""
        order = self.orders[rule] if most else self.orders[rule][::-1]
        for where in self.at:
            count = tokens_at(where, len(order)) if self.plan.site == "embed" else int(where)
            yield tuple(sorted(order[:count].tolist()))

    def asked(self) -> list[tuple[int, ...]]:
        """Return everything that is to be measured, each once."""
        every = [
            off
            for rule in self.plan.rules
            for most in (True, False)
            for off in self.off(rule, most)
        ]
        return list(dict.fromkeys([*every, self.without_answer]))

    def item(self, off: Sequence[int], token_id: int | None) -> dict[str, Any]:
        """Return the job, as arguments of `trace`, that measures with so much switched off.

        Parameters
        ----------
        token_id
            Of the token that takes the place of others; None: there is none.
        """
        ids = _prompt_ids(self.trace)
        edits: list[Edit] = []
        if token_id is not None:
            for position in off:
                ids[position] = token_id
        elif self.plan.site == "neuron":
            edits = self._neurons_off(off)
        elif off:
            change: dict[str, Any] = {"mean": True} if self.plan.replace == "mean" else {"scale": 0}
            edits = [Edit("embed", positions=off, **change)]
        return {"input_ids": ids, "target": self._target(), "sites": (), "edits": edits}

    def note(self, off: tuple[int, ...], value: float) -> None:
        """Keep what a job measured: a logit or a log-probability."""
        self.values[off] = exp(value) if self.plan.measure == "probability" else value

    def curve(self, rule: str, most: bool) -> Floats:
        """Return what was measured at each point."""
        return np.array([self.values[off] for off in self.off(rule, most)])

    def _target(self) -> Target:
        """Return the target that the trace resolved: it stays when something is switched off."""
        target, logprob = self.trace.target, self.plan.measure != "logit"
        if target.continuation_ids:
            return Target(continuation=target.continuation_ids, logprob=logprob)
        return Target(target.token_id, target.position, target.contrast_id, logprob=logprob)

    def _neurons_off(self, off: Sequence[int]) -> list[Edit]:
        width = self.trace["neuron"].shape[-1]
        layers: dict[int, list[int]] = {}
        for index in off:
            layer, neuron = divmod(index, width)
            layers.setdefault(self.trace.layers[layer], []).append(neuron)
        return [
            Edit("neuron", layer, neurons, self.free, scale=0) for layer, neurons in layers.items()
        ]


def _prompt_ids(trace: Trace) -> list[int]:
    """Return the prompt's ids, without those of a continuation that follow it in a trace."""
    end = trace.target.position + 1 if trace.target.continuation_ids else None
    return trace.token_ids[:end]


def _located(answer: Sequence[int], values: Floats) -> tuple[float, float]:
    """Return whether the answer is strongest, and the share of positive relevance on it."""
    positive = np.maximum(values, 0.0)
    total = positive.sum()
    share = float(positive[list(answer)].sum() / total) if total else 0.0
    return float(int(values.argmax()) in answer), share
