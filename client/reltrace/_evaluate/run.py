"""Runs an evaluation: traces, then forward passes with something switched off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reltrace._edit import Edit
from reltrace._errors import TraceError, invalid
from reltrace._evaluate.evaluation import Evaluation, RuleScore
from reltrace._evaluate.prompts import Prompt
from reltrace._evaluate.scores import Floats, Mean, area, shares, strongest_first, tokens_at
from reltrace._request import Arguments, Priority
from reltrace._target import Target
from reltrace._trace import Failure, Trace

if TYPE_CHECKING:
    from reltrace._aio import AsyncClient

RANDOM = "random"
SITES = ("embed", "neuron")

_AT_ONCE = 64
"""Prompts whose traces and curves are held at a time."""

_MOST_NEURONS = 4096


@dataclass(frozen=True, slots=True)
class Plan:
    """What is evaluated, and how.

    Attributes
    ----------
    rules : tuple of str
        Of traces; "random" is an order without a trace.
    site : str
        "embed": tokens are switched off; "neuron": neurons, at all tokens.
    points : int
        Steps of a curve.
    seed : int
        Of random orders.
    """

    rules: tuple[str, ...]
    site: str
    points: int
    seed: int

    @classmethod
    def of(cls, rules: Sequence[str], site: str, points: int, seed: int) -> Plan:
        """Check the arguments of `evaluate`."""
        if isinstance(rules, str) or not rules or len(set(rules)) < len(rules):
            raise invalid("rules", f"must be names of rules, each once, not {rules!r}")
        if set(rules) == {RANDOM}:
            raise invalid("rules", "needs one beside random, whose traces name the target")
        if site not in SITES:
            raise invalid("site", f"must be one of {', '.join(SITES)}, not {site!r}")
        if not isinstance(points, int) or not 1 <= points <= 100:
            raise invalid("points", f"must be 1 to 100, not {points!r}")
        return cls(tuple(rules), site, points, seed)

    def axis(self, neurons: int) -> Floats:
        """Return where the points of a curve are: shares of tokens, or numbers of neurons."""
        if self.site == "embed":
            return shares(self.points)
        most = min(neurons, _MOST_NEURONS)
        numbers = np.unique(np.round(np.geomspace(1, most, self.points)))
        return np.concatenate([[0.0], numbers])


@dataclass(slots=True)
class _Curves:
    """What one prompt's target is with this or that switched off."""

    prompt: Prompt
    traces: dict[str, Trace]
    orders: dict[str, NDArray[np.int64]]
    axis: Floats
    values: dict[tuple[int, ...], float] = field(default_factory=dict)
    """The target by what is switched off, as rising indices."""

    @property
    def trace(self) -> Trace:
        return next(iter(self.traces.values()))

    def off(self, site: str) -> Iterator[tuple[str, bool, int, tuple[int, ...]]]:
        """Yield (rule, most relevant first, point, indices that are switched off)."""
        for rule, order in self.orders.items():
            for most in (True, False):
                turned = order if most else order[::-1]
                for point, where in enumerate(self.axis):
                    count = tokens_at(where, len(order)) if site == "embed" else int(where)
                    yield rule, most, point, tuple(sorted(turned[:count].tolist()))


class Run:
    """One evaluation.

    Parameters
    ----------
    client
        Whose traces.
    plan
        What and how.
    defaults
        Model and target of prompts that do not say otherwise.
    priority
        Of all jobs.
    """

    def __init__(
        self, client: AsyncClient, plan: Plan, defaults: Mapping[str, Any], priority: Priority
    ) -> None:
        self._client = client
        self._plan = plan
        self._defaults = {key: value for key, value in defaults.items() if value is not None}
        self._priority = priority
        self._traced = [rule for rule in plan.rules if rule != RANDOM]
        self._failures: dict[str | int, Exception] = {}
        self._areas: dict[str, list[float]] = {rule: [] for rule in plan.rules}
        self._sums: dict[tuple[str, bool], Floats] = {}
        self._hits: dict[str, list[float]] = {rule: [] for rule in plan.rules}
        self._masses: dict[str, list[float]] = {rule: [] for rule in plan.rules}
        self._count = 0
        self._model = ""
        self._axis: Floats = np.zeros(0)

    async def over(self, prompts: Iterable[object]) -> Evaluation:
        """Evaluate prompts, some dozens at a time."""
        numbered = enumerate(prompts)
        while some := [Prompt.of(number, given) for number, given in islice(numbered, _AT_ONCE)]:
            for curves in await self._evaluated(some):
                self._add(curves)
        rules = {rule: self._score(rule) for rule in self._plan.rules}
        return Evaluation(
            self._model, self._plan.site, self._count, self._axis, rules, self._failures
        )

    async def _many(self, items: list[dict[str, Any]]) -> AsyncIterator[Any]:
        run = self._client.start_many(
            items,
            Arguments(**self._defaults),
            ordered=False,
            max_in_flight=1024,
            priority=self._priority,
            timeout=None,
        )
        try:
            while results := await run.take():
                for result in results:
                    yield result
        finally:
            await run.close()

    async def _evaluated(self, prompts: Sequence[Prompt]) -> list[_Curves]:
        by_number = await self._trace(prompts)
        items, slots = [], []
        for number, curves in by_number.items():
            target = _same_target(curves.trace)
            for off in dict.fromkeys(off for *_, off in curves.off(self._plan.site)):
                slots.append((number, off))
                items.append(
                    {
                        "id": len(slots) - 1,
                        "input_ids": curves.trace.token_ids,
                        "target": target,
                        "sites": (),
                        "edits": self._edits(off, curves.trace),
                    }
                )
        failed = set()
        async for result in self._many(items):
            number, off = slots[result.id]
            if isinstance(result, Failure):
                failed.add(number)
                self._failures[by_number[number].prompt.id] = result.error
            else:
                by_number[number].values[off] = result.target.logit
        return [curves for number, curves in by_number.items() if number not in failed]

    async def _trace(self, prompts: Sequence[Prompt]) -> dict[int, _Curves]:
        reduce = "token" if self._plan.site == "embed" else "feature"
        items = [
            {
                **prompt.item,
                "id": number * len(self._traced) + place,
                "rule": rule,
                "sites": (self._plan.site,),
                "reduce": reduce,
            }
            for number, prompt in enumerate(prompts)
            for place, rule in enumerate(self._traced)
        ]
        traces: dict[int, dict[str, Trace]] = {}
        async for result in self._many(items):
            number, place = divmod(result.id, len(self._traced))
            if isinstance(result, Failure):
                self._failures[prompts[number].id] = result.error
            else:
                traces.setdefault(number, {})[self._traced[place]] = result
        found = {}
        for number, of_prompt in sorted(traces.items()):
            prompt = prompts[number]
            if len(of_prompt) < len(self._traced):
                continue
            try:
                found[number] = self._curves(prompt, of_prompt)
            except TraceError as error:
                self._failures[prompt.id] = error
        return found

    def _curves(self, prompt: Prompt, by_rule: dict[str, Trace]) -> _Curves:
        traces = {rule: by_rule[rule] for rule in self._traced}
        scores = {rule: t[self._plan.site].astype(np.float64).ravel() for rule, t in traces.items()}
        length = len(next(iter(scores.values())))
        if RANDOM in self._plan.rules:
            # Whichever prompts come beside it: its own order.
            seed = [self._plan.seed, *next(iter(traces.values())).token_ids]
            scores[RANDOM] = np.random.default_rng(seed).standard_normal(length)
        if prompt.answer is not None and self._plan.site == "embed":
            self._locate(prompt.where(next(iter(traces.values()))), scores)
        orders = {rule: strongest_first(scores[rule]) for rule in self._plan.rules}
        return _Curves(prompt, traces, orders, self._plan.axis(length))

    def _locate(self, answer: Sequence[int], scores: Mapping[str, Floats]) -> None:
        for rule, values in scores.items():
            positive = np.maximum(values, 0.0)
            self._hits[rule].append(float(int(values.argmax()) in answer))
            total = positive.sum()
            self._masses[rule].append(float(positive[list(answer)].sum() / total) if total else 0.0)

    def _edits(self, off: tuple[int, ...], trace: Trace) -> list[Edit]:
        if not off:
            return []
        if self._plan.site == "embed":
            return [Edit("embed", positions=off, scale=0.0)]
        width = trace["neuron"].shape[-1]
        layers: dict[int, list[int]] = {}
        for index in off:
            layer, neuron = divmod(index, width)
            layers.setdefault(trace.layers[layer], []).append(neuron)
        return [Edit("neuron", layer, neurons, scale=0.0) for layer, neurons in layers.items()]

    def _add(self, curves: _Curves) -> None:
        self._count += 1
        self._axis, self._model = curves.axis, curves.trace.provenance.model
        found = {
            (rule, most): np.zeros(len(curves.axis))
            for rule in self._plan.rules
            for most in (True, False)
        }
        for rule, most, point, off in curves.off(self._plan.site):
            found[rule, most][point] = curves.values[off]
        for key, values in found.items():
            self._sums[key] = self._sums.get(key, np.zeros(len(values))) + values
        on_unit = curves.axis / curves.axis[-1]
        for rule in self._plan.rules:
            self._areas[rule].append(area(found[rule, True], found[rule, False], on_unit))

    def _score(self, rule: str) -> RuleScore:
        empty = np.full(len(self._axis), np.nan)
        most, least = (
            self._sums[rule, first] / self._count if self._count else empty
            for first in (True, False)
        )
        hits, masses = self._hits[rule], self._masses[rule]
        return RuleScore(
            area=Mean.of(self._areas[rule]),
            most=most,
            least=least,
            hit=Mean.of(hits) if hits else None,
            mass=Mean.of(masses) if masses else None,
        )


def _same_target(trace: Trace) -> Target:
    """Return the target that a trace resolved, so that it stays when something is switched off."""
    target = trace.target
    if target.continuation_ids:
        raise invalid("target", "of a continuation can not be evaluated; name a token")
    return Target(target.token_id, target.position, target.contrast_id, logprob=target.logprob)
