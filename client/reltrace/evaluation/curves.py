"""The target of one prompt while tokens are replaced or neurons switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reltrace.evaluation.prompts import Prompt
from reltrace.evaluation.scores import Floats, strongest_first, tokens_at
from reltrace.evaluation.settings import RANDOM, Settings
from reltrace.types.edit import Edit
from reltrace.types.errors import invalid
from reltrace.types.target import Target
from reltrace.types.trace import Trace


@dataclass(slots=True)
class Curves:
    prompt: Prompt
    settings: Settings
    trace: Trace  # by the first rule; all rules have the same target
    free: tuple[int, ...]  # positions of the prompt's tokens that are not kept
    orders: dict[str, NDArray[np.int64]]  # by rule: tokens or neurons, the most relevant first
    at: Floats  # how much is switched off at each point
    # By rule: whether the answer is strongest, and the share of positive relevance on it.
    located: dict[str, tuple[float, float]]
    answer: tuple[int, ...] | None  # its positions; None: unknown, or neurons are switched off
    # What was measured, by the rising indices of what was switched off.
    values: dict[tuple[int, ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, traces: Mapping[str, Trace], settings: Settings) -> Curves:
        """Return the curves of a prompt, by its traces by rule, with nothing measured yet.

        Raises InvalidArgument if the prompt has no token that may be replaced, or not the answer,
        or its target has no value of the measure.
        """
        trace = next(iter(traces.values()))
        if settings.measure == "probability" and trace.target.contrast_id is not None:
            raise invalid("measure", "a contrast has no probability, but a logit")
        ids = _prompt_ids(trace)
        tokens = settings.site == "embed"
        scores = {
            # Behind the prompt's tokens are those of a continuation.
            rule: one[settings.site].astype(np.float64).ravel()[: len(ids) if tokens else None]
            for rule, one in traces.items()
        }
        length = len(scores[next(iter(scores))])
        if RANDOM in settings.rules:
            # Of the prompt alone: the other prompts do not change its order.
            scores[RANDOM] = np.random.default_rng([settings.seed, *ids]).standard_normal(length)
        kept = settings.kept(trace)
        free = [position for position in range(len(ids)) if position not in kept]
        if not free:
            raise invalid("prompt", f"has no token to replace: of its {len(ids)}, all are kept")
        orders = {rule: strongest_first(scores[rule]) for rule in settings.rules}
        if tokens:
            orders = {rule: order[np.isin(order, free)] for rule, order in orders.items()}
        answer, located = None, {}
        if prompt.answer is not None and tokens:
            answer = tuple(prompt.answer_positions(trace, len(ids)))
            located = {rule: _located(answer, scores[rule]) for rule in settings.rules}
        return cls(
            prompt, settings, trace, tuple(free), orders, settings.at(length), located, answer
        )

    @property
    def without_answer(self) -> tuple[int, ...]:
        """The answer's tokens that may be replaced."""
        return tuple(sorted(set(self.answer or ()) & set(self.free)))

    def off(self, rule: str, most: bool) -> Iterator[tuple[int, ...]]:
        """Yield what is switched off at each point, most or least relevant first."""
        order = self.orders[rule] if most else self.orders[rule][::-1]
        for where in self.at:
            count = int(where)
            if self.settings.site == "embed":
                count = tokens_at(where, len(order))
            yield tuple(sorted(order[:count].tolist()))

    def required(self) -> list[tuple[int, ...]]:
        """Return all that is to be switched off and measured, each once."""
        every = [
            off
            for rule in self.settings.rules
            for most in (True, False)
            for off in self.off(rule, most)
        ]
        return list(dict.fromkeys([*every, self.without_answer]))

    def item(self, off: Sequence[int], token_id: int | None) -> dict[str, Any]:
        """Return the arguments of `trace` that measure with `off` switched off.

        `token_id` is the token that replaces others, if one does.
        """
        ids = _prompt_ids(self.trace)
        edits: list[Edit] = []
        if token_id is not None:
            for position in off:
                ids[position] = token_id
        elif self.settings.site == "neuron":
            edits = self._neurons_off(off)
        elif off:
            mean = self.settings.replace == "mean"
            change: dict[str, Any] = {"mean": True} if mean else {"scale": 0}
            edits = [Edit("embed", positions=off, **change)]
        # The target as the trace resolved it: the edits do not change it.
        target, logprob = self.trace.target, self.settings.measure != "logit"
        measured = Target(target.token_id, target.position, target.contrast_id, logprob=logprob)
        if target.continuation_ids:
            measured = Target(continuation=target.continuation_ids, logprob=logprob)
        return {"input_ids": ids, "target": measured, "sites": (), "edits": edits}

    def record(self, off: tuple[int, ...], value: float) -> None:
        """Keep what a job measured: a logit or a log-probability."""
        self.values[off] = exp(value) if self.settings.measure == "probability" else value

    def curve(self, rule: str, most: bool) -> Floats:
        return np.array([self.values[off] for off in self.off(rule, most)])

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
    """Return the prompt's token ids, without those of a continuation that follow in a trace."""
    end = trace.target.position + 1 if trace.target.continuation_ids else None
    return trace.token_ids[:end]


def _located(answer: Sequence[int], values: Floats) -> tuple[float, float]:
    """Return whether the answer is strongest, and the share of positive relevance on it."""
    positive = np.maximum(values, 0.0)
    total = positive.sum()
    share = float(positive[list(answer)].sum() / total) if total else 0.0
    return float(int(values.argmax()) in answer), share
